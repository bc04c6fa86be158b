"""One folder with everything that leaves the machine: exports, their proof, what they stand on, and a self-test."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from addenda.bases import LoadedBase
from addenda.bases.cache import sha256_of
from addenda.bases.gguf_origin import from_gguf
from addenda.core.handle import Handle
from addenda.core.progress import OnProgress
from addenda.errors import ConfigError
from addenda.export.folder import new_folder, sums_of
from addenda.export.format import format_of, require_context
from addenda.export.gguf.origin import file_of, why_no_origin
from addenda.export.parity import Parity
from addenda.export.probes import Probes, Row, answer, probes_of
from addenda.export.run import OnGated, export_adapter
from addenda.export.table import gate_table

__all__ = ["MANIFEST", "SELFTEST", "Limits", "limits_of", "write_bundle"]

MANIFEST, SELFTEST = "bundle.json", "selftest.json"
_ROWS, _KEPT = 6, 24
"""Rows of the self-test, and likeliest tokens that it keeps for each position."""
_SCRIPT = Path(__file__).with_name("selftest_llama.py")
_FOR_LLAMA_CPP = {"gguf": "model", "gguf-lora": "adapter"}
_FILES = {"gguf": "model.gguf", "gguf-lora": "adapter.gguf"}


@dataclass(frozen=True)
class Limits:
    """What the self-test's figures may be on another machine."""

    kl: float
    top1: float


def limits_of(parity: Parity) -> Limits:
    """Twice what the export lost when it was made, and a little: other machines add up in another order.

    Example:
        >>> limits_of(Parity("unverified", "", 0.0))
        Limits(kl=0.1, top1=0.8)
    """
    real = parity.real
    if real is None or real.kl is None or real.top1_agreement is None:
        return Limits(0.1, 0.8)
    return Limits(2 * real.kl.value + 0.01, max(0.0, real.top1_agreement - 0.1))


def write_bundle(
    base: LoadedBase,
    handle: Handle,
    forms: Sequence[tuple[str, str | None]],
    folder: str | os.PathLike[str],
    *,
    with_base: bool = False,
    calibration: Sequence[Row] = (),
    context: int | None = None,
    allow_drift: bool = False,
    provenance: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    on_gated: OnGated | None = None,
) -> dict[str, Parity]:
    """Write exports into one new folder, with tokenizer, template, provenance, the gate's tables and a self-test.

    Args:
        base: carrying the adapter, best in float32.
        handle: the adapter.
        forms: names of formats, each with one of its types or None.
        folder: must not exist, or be empty.
        with_base: also copy the base's GGUF file, made where it came without, so that a GGUF adapter is complete.
        calibration: as for `export_adapter`, of all exports.
        context: as for `export_adapter`, of those that have one.
        allow_drift: as for `export_adapter`.
        provenance: what the adapter's manifest says of its training.
        on_progress: told of the steps.
        on_gated: as for `export_adapter`.

    Returns:
        What the gate found, by the name of each export.

    Raises:
        ConfigError: no format, or one twice, a context that none of them has, or a base without a GGUF form to copy.
        ExportError: one of them cannot carry the adapter, or does not answer like it; nothing is then written.
    """
    names = _named(forms)
    if context is not None and not any(format_of(form).has_context for form, _ in forms):
        require_context(forms[0][0], context, base.room)
    problem = why_no_origin(base)
    if with_base and problem:
        raise ConfigError(f"there is no GGUF file to copy: {problem}", hint="leave out --with-base")
    # Made only for who asks for it: it takes as much room as the base.
    asked = with_base or from_gguf(base) or any(form.startswith("gguf") for form, _ in forms)
    origin = file_of(base, on_progress=on_progress) if asked and not problem else None
    found: dict[str, Parity] = {}
    with new_folder(folder) as work:
        for name, (form, kind) in names.items():
            found[name] = export_adapter(
                base,
                handle,
                form,
                work / name,
                type=kind,
                calibration=calibration,
                context=context if format_of(form).has_context else None,
                allow_drift=allow_drift,
                provenance=provenance,
                on_progress=on_progress,
                on_gated=on_gated,
            )
        base.tokenizer.save_pretrained(work / "tokenizer")
        if with_base and origin is not None:
            shutil.copyfile(origin, work / "base.gguf")
        _write_selftest(base, work)
        manifest = _manifest(base, handle, names, found, provenance or {}, origin, work)
        (work / "README.md").write_text(_page(base, handle, found, manifest), encoding="utf-8")
        manifest["sha256"] = sums_of(work)
        (work / MANIFEST).write_text(
            json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    return found


def _named(forms: Sequence[tuple[str, str | None]]) -> dict[str, tuple[str, str | None]]:
    names = {form if kind is None else f"{form}-{kind}": (form, kind) for form, kind in forms}
    if not names or len(names) < len(forms):
        raise ConfigError(
            "a bundle holds one export at least, and each once",
            hint="name them: --to gguf-lora --to gguf:q8_0",
        )
    return names


def _write_selftest(base: LoadedBase, work: Path) -> None:
    probes = probes_of(base)
    letter = base.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
    rows = [
        {**_kept(row["input_ids"], answer(base.model, row, probes.kind)), "letter": letter}
        for row in _some(probes)
    ]
    text = json.dumps({"rows": rows}, separators=(",", ":"))
    (work / SELFTEST).write_text(text + "\n", encoding="utf-8")
    shutil.copyfile(_SCRIPT, work / "selftest.py")


def _some(probes: Probes) -> Sequence[Mapping[str, Tensor]]:
    """Some rows, conversations among them: those are last."""
    return probes.rows[-_ROWS:] if probes.kind == "next-token" else ()


def _kept(ids: Tensor, answers: Tensor) -> dict[str, Any]:
    values, tokens = answers.topk(min(_KEPT, answers.shape[-1]), dim=-1)
    likeliest = [
        [[token, round(value, 5)] for token, value in zip(*each, strict=True)]
        for each in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
    return {"ids": ids[0].tolist(), "likeliest": likeliest}


def _manifest(  # noqa: PLR0917
    base: LoadedBase,
    handle: Handle,
    names: Mapping[str, tuple[str, str | None]],
    found: Mapping[str, Parity],
    provenance: Mapping[str, Any],
    origin: Path | None,
    work: Path,
) -> dict[str, Any]:
    llama = next((name for name, (form, _) in names.items() if form in _FILES), None)
    about_llama = {}
    if llama is not None:
        form = names[llama][0]
        about_llama = {_FOR_LLAMA_CPP[form]: f"{llama}/{_FILES[form]}"}
    limits = limits_of(found[llama] if llama else next(iter(found.values())))
    return {
        "adapter": handle.name,
        "method": handle.method.name,
        "base": base.describe() | {"folder": None},
        "base_gguf_sha256": sha256_of(origin) if origin else None,
        "license": base.license,
        "template_sha256": base.template_sha256,
        "tokenizer_sha256": base.tokenizer_sha256,
        "exports": {
            name: {
                "format": form,
                "type": kind,
                "parity": found[name].document(),
                "bytes": _size(work / name),
            }
            for name, (form, kind) in names.items()
        },
        "llama_cpp": about_llama,
        "limits": {"kl": limits.kl, "top1": limits.top1},
        "provenance": dict(provenance),
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _page(base: LoadedBase, handle: Handle, found: Mapping[str, Parity], manifest: Mapping[str, Any]) -> str:
    lines = [
        f"# {base.name} with '{handle.name}'",
        f"Licence of the base: {base.license}.",
        f"SHA-256 of its GGUF file: {manifest['base_gguf_sha256'] or 'it has none'}.",
        "## Check it where it runs",
        "```sh\naddenda verify .\npython selftest.py --llama-server llama-server\n```",
    ]
    for name, parity in found.items():
        size = manifest["exports"][name]["bytes"]
        lines += [f"## {name}, {size / 1e6:.1f} MB", gate_table(parity)]
    return "\n\n".join(lines) + "\n"
