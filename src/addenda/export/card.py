"""The README of an exported folder: a model card with facts of the run and no holes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from addenda.export.parity import Parity
from addenda.export.table import gate_table

__all__ = ["model_card"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    *,
    title: str,
    library: str,
    tags: Sequence[str],
    usage: str,
    provenance: Mapping[str, Any],
    parity: Parity,
) -> str:
    """Write the card from what is known; a fact that is not known has no line.

    Args:
        title: the heading.
        library: what loads the folder, as the hub names it.
        tags: further tags for the hub.
        usage: Markdown that says how it is used.
        provenance: as kept with the adapter by ``addenda train``.
        parity: the result of the gate.
    """
    base = dict(provenance.get("base") or {})
    sections = [_front_matter(base, library, tags), f"# {title}", _facts(base, provenance)]
    if usage:
        sections += ["## Use", usage.strip()]
    if measured := _measured(provenance):
        sections += ["## Measured", measured]
    sections += ["## Checked on export", gate_table(parity)]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(base: Mapping[str, Any], library: str, tags: Sequence[str]) -> str:
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    source = str(base.get("source", ""))
    if _HUB_ID.fullmatch(source.partition("@")[0]):
        lines.insert(0, f"base_model: {source.partition('@')[0]}")
    if base.get("license") not in (None, "unknown"):
        lines.append(f"license: {base['license']}")
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _facts(base: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    data, versions = dict(provenance.get("data") or {}), dict(provenance.get("versions") or {})
    known = {
        "Base model": base.get("name"),
        "Base loaded from": base.get("source"),
        "Base weights": "; ".join(base.get("notes") or ()),
        "Method": provenance.get("method"),
        "Training data": data.get("name"),
        "Training data SHA-256": data.get("sha256"),
        "Training rows": data.get("train_rows"),
        "Chat template SHA-256": provenance.get("template_sha256"),
        "Seed": provenance.get("seed"),
        "Made with": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return "\n".join(f"- {name}: {value}" for name, value in known.items() if value not in (None, ""))


def _measured(provenance: Mapping[str, Any]) -> str:
    figures = dict(provenance.get("figures") or {})
    names = {
        "heldout_nll_before": "Held-out nll before, nats per token",
        "heldout_nll_after": "Held-out nll after, nats per token",
        "heldout_token_accuracy_before": "Held-out token accuracy before",
        "heldout_token_accuracy_after": "Held-out token accuracy after",
        "base_kl_general": "KL from the base on general prompts, nats per token",
    }
    return "\n".join(f"- {text}: {figures[key]:.4f}" for key, text in names.items() if key in figures)
