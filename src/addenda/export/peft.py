"""PEFT's adapter folder, written and read; the only file that knows PEFT's names.

Layout (peft 0.21): ``adapter_config.json`` and ``adapter_model.safetensors`` with the keys
``base_model.model.<layer path>.lora_A.weight`` (rank, d_in), ``.lora_B.weight`` (d_out, rank), and for (IA)3
``.ia3_l``, (1, d_in) where the input is scaled and (d_out, 1) where the output is.

What is read is literal: no regular expression from a file is ever run, no pickle opened, and ``auto_mapping``, which
names a class to import, is not looked at.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.registry import find
from addenda.core.attaching import attach_paths
from addenda.core.contract import Adapter, Method
from addenda.core.handle import Handle
from addenda.core.layers import kind_of
from addenda.core.planning import planned_rows
from addenda.core.progress import OnProgress
from addenda.core.targets import exact, matches
from addenda.errors import CheckpointError, ExportError, NotFoundError, UnsafeError
from addenda.export.card import model_card
from addenda.export.folder import new_folder, write_record
from addenda.export.parity import Parity, logits_of, probe_rows, require_parity
from addenda.methods.ia3 import IA3, IA3Adapter
from addenda.methods.lora import LoRA

__all__ = ["CONFIG", "TENSORS", "export_peft", "import_peft", "read_config", "write_peft"]

_LINEAR = ("linear", "conv1d-transposed")

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LITERAL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_CONFIG_LIMIT = 2**20

_USAGE = """
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({source!r})
model = PeftModel.from_pretrained(base, "this folder")
"""

_USAGE_REGISTERED = """
import addenda
from peft import PeftModel

base = addenda.load_base({source!r})
model = PeftModel.from_pretrained(base.model, "this folder")
"""

# Settings of PEFT that change what the model computes and have no counterpart here; set, they are refused.
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "exclude_modules",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
# Initialisations that also change the base's weights, so that the tensors alone do not say what was trained.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def export_peft(
    base: LoadedBase,
    handle: Handle,
    folder: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> Parity:
    """Write an adapter as a PEFT folder with tokenizer, chat template, card and ``export.json``.

    The folder is read again, by PEFT where it is installed and by `import_peft` otherwise, and must answer like the
    adapted model before it appears under its name. The model in memory stays as it was.

    Args:
        base: the loaded base, in float32, carrying the adapter.
        handle: a LoRA or (IA)3 adapter.
        folder: the new folder; must not exist, or be empty.
        provenance: what the adapter's manifest says of its training.
        on_progress: told of the steps.

    Raises:
        ExportError: PEFT has no form for the adapter, or the export answers otherwise.
        BusyError: the folder exists and is not empty.
    """
    facts = dict(provenance or {})
    registered = find(base.name) is not None
    source, _, revision = (base.name if registered else base.source).partition("@")
    with new_folder(folder) as work:
        write_peft(handle, work, base_name=source, revision=revision or None)
        rows = probe_rows(base)
        wanted = logits_of(base.model, rows, on_progress=on_progress)
        with handle.disabled():
            reader, found = _read_again(base.model, work, rows, on_progress)
        parity = require_parity(wanted, found, reader=reader)
        base.tokenizer.save_pretrained(work)
        write_record(work, form="peft", parity=parity, provenance=facts)
        card = model_card(
            title=f"Adapter '{handle.name}' for {base.name}",
            library="peft",
            tags=["addenda", handle.method.name],
            usage=(_USAGE_REGISTERED if registered else _USAGE).format(source=source),
            provenance=facts,
            parity=parity,
        )
        (work / "README.md").write_text(card, encoding="utf-8")
    return parity


def _read_again(
    model: nn.Module, folder: Path, rows: list[Tensor], on_progress: OnProgress | None
) -> tuple[str, list[Tensor]]:
    """Load the folder onto the bare model, run it, and take it off again."""
    if importlib.util.find_spec("peft") is None:
        again = import_peft(model, folder, name="export-gate")
        try:
            return "addenda's own reader (peft is not installed)", logits_of(
                model, rows, on_progress=on_progress
            )
        finally:
            again.detach()
    import peft

    with warnings.catch_warnings():
        # PEFT asks transformers for properties that transformers has renamed; nothing the user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        theirs = peft.PeftModel.from_pretrained(model, folder)
    try:
        return f"peft {peft.__version__}", logits_of(theirs, rows, on_progress=on_progress)
    finally:
        theirs.unload()


def write_peft(
    handle: Handle,
    folder: str | os.PathLike[str],
    *,
    base_name: str | None = None,
    revision: str | None = None,
) -> None:
    """Write the adapter's two files into ``folder``, which exists, as PEFT's own ``save_pretrained`` would.

    Args:
        handle: a LoRA or (IA)3 adapter on linear layers.
        folder: where the files go.
        base_name: what PEFT should load as the base: best a hub id.
        revision: the base's commit, if it has one.

    Raises:
        ExportError: PEFT has no form for this method, or for one of its layers.
    """
    method = handle.method
    _require_expressible(handle)
    config: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "fan_in_fan_out": any(_kind(handle, path) == "conv1d-transposed" for path in handle.paths),
        "inference_mode": True,
        "modules_to_save": None,
        "revision": revision,
        "target_modules": _targets(handle.model, handle.paths),
        "task_type": "CAUSAL_LM" if hasattr(handle.model, "lm_head") else None,
    }
    if isinstance(method, LoRA):
        config.update(_lora_config(method, handle.paths))
    elif isinstance(method, IA3):
        config.update(_ia3_config(handle))
    path = Path(folder)
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(_foreign_tensors(handle), path / TENSORS, metadata={"format": "pt"})


def _require_expressible(handle: Handle) -> None:
    method = handle.method
    if not isinstance(method, (LoRA, IA3)):
        reason = (
            "PEFT has no bottleneck adapters" if method.name == "bottleneck" else "PEFT has no such method"
        )
        advice = "'--to merged' keeps it" if method.mergeable else "the native folder is its only form"
        raise ExportError(f"method '{method.name}' cannot be written for PEFT: {reason}", hint=advice)
    kinds = {path: kind_of(handle.model.get_submodule(path)) for path in handle.paths}
    other = [path for path, kind in kinds.items() if not (kind and kind.among(_LINEAR))]
    if other:
        raise ExportError(
            f"{len(other)} adapted layers are not linear, first '{other[0]}'",
            where={"kind": _kind(handle, other[0])},
            hint="only linear layers are written for PEFT; '--to merged' keeps all of them",
        )


def _kind(handle: Handle, path: str) -> str:
    kind = kind_of(handle.model.get_submodule(path))
    return kind.name if kind else "unknown"


def _targets(model: nn.Module, paths: list[str]) -> list[str]:
    """Last names where they name exactly the adapted layers, as serving engines like them; else whole paths."""
    names = sorted({path.rpartition(".")[2] for path in paths})
    named = {
        path
        for path, _ in model.named_modules()
        if ".adapters." not in path and path.rpartition(".")[2] in names
    }
    return names if named == set(paths) else sorted(paths)


def _lora_config(method: LoRA, paths: list[str]) -> dict[str, Any]:
    ranks = {path: method.rank_at(path) for path in paths}
    alphas = {path: _alpha(method, path) for path in paths}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "bias": "none",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": method.dropout,
        "use_rslora": method.rank_stabilized,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
    }


def _alpha(method: LoRA, path: str) -> int | float:
    rank = method.rank_at(path)
    alpha = method.scaling_at(path) * (math.sqrt(rank) if method.rank_stabilized else rank)
    # The way through the scaling costs the last bit; 12 digits give back the number that was set.
    alpha = float(f"{alpha:.12g}")
    return int(alpha) if alpha.is_integer() else alpha


def _ia3_config(handle: Handle) -> dict[str, Any]:
    inner = [path for path, adapter in handle.adapters.items() if getattr(adapter, "at_input", False)]
    return {
        "peft_type": "IA3",
        "target_modules": sorted(handle.paths),
        "feedforward_modules": sorted(inner),
        "init_ia3_weights": True,
    }


def _foreign_tensors(handle: Handle) -> dict[str, Tensor]:
    tensors = {}
    for path, adapter in handle.adapters.items():
        for key, tensor in _foreign_names(path, adapter).items():
            tensors[key] = tensor.detach().cpu().clone().contiguous()
    return tensors


def _foreign_names(path: str, adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's parameters under PEFT's keys, in PEFT's shapes; views on them, so that a copy fills them."""
    if isinstance(adapter, IA3Adapter):
        scale = adapter.scale
        return {f"{_PREFIX}{path}.ia3_l": scale[None, :] if adapter.at_input else scale[:, None]}
    halves = dict(adapter.named_parameters())
    return {f"{_PREFIX}{path}.lora_{half}.weight": halves[half] for half in ("A", "B")}


def import_peft(model: nn.Module, folder: str | os.PathLike[str], *, name: str = "default") -> Handle:
    """Attach the adapter of a PEFT folder; it answers as under PEFT, and is frozen like any loaded adapter.

    Args:
        model: the base it was trained on.
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        name: the adapter's name on the model.

    Raises:
        NotFoundError: a file is missing.
        UnsafeError: the folder asks for what could run code: pickled weights, or a regular expression.
        CheckpointError: a setting has no counterpart here, or settings, tensors and model disagree. The model is
            then as it was.
    """
    source = Path(folder)
    config = read_config(source)
    tensors = _read_tensors(source)
    paths = _paths(tensors, source)
    method = _method(config, paths, source)
    _require_same_targets(model, config, paths, source)
    rows = planned_rows(method, exact(model, paths, kinds=_LINEAR))
    handle = attach_paths(model, method, [row.path for row in rows], name=name)
    try:
        _fill(handle, tensors, source)
    except BaseException:
        handle.detach()
        raise
    for parameter in handle.parameters():
        parameter.requires_grad_(False)
    return handle


def read_config(source: Path) -> dict[str, Any]:
    """Return the configuration of a PEFT folder, checked for what could run code.

    Raises:
        NotFoundError: there is none.
        UnsafeError: the folder asks for what could run code.
        CheckpointError: it is no configuration.
    """
    path = source / CONFIG
    pickled = sorted(file.name for file in source.glob("*.bin")) + sorted(
        file.name for file in source.glob("*.pt")
    )
    if not path.is_file():
        raise NotFoundError(
            f"'{source}' holds no {CONFIG}", hint="name a folder written by PEFT's save_pretrained"
        )
    if pickled and not (source / TENSORS).is_file():
        raise UnsafeError(
            f"the weights are pickled ('{pickled[0]}'), and unpickling runs code",
            where={"folder": source},
            hint="save them again with PEFT's save_pretrained(..., safe_serialization=True)",
        )
    if path.stat().st_size > _CONFIG_LIMIT:
        raise _unfit(
            f"{CONFIG} has {path.stat().st_size:,} bytes, more than any adapter's configuration", source
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise _unfit(f"{CONFIG} is not JSON: {problem}", source) from problem
    if not isinstance(config, dict):
        raise _unfit(f"{CONFIG} is not a table", source)
    _require_safe(config, source)
    return config


def _require_safe(config: Mapping[str, Any], source: Path) -> None:
    patterns = [key for key in ("target_modules", "feedforward_modules") if isinstance(config.get(key), str)]
    patterns = [key for key in patterns if config[key] != "all-linear"]
    listed = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for key in ("target_modules", "feedforward_modules"):
        listed += config[key] if isinstance(config.get(key), list) else []
    odd = [f"{key} = {config[key]!r}" for key in patterns]
    odd += [repr(entry) for entry in listed if not (isinstance(entry, str) and _LITERAL.fullmatch(entry))]
    if odd:
        raise UnsafeError(
            f"layers are named by a regular expression, which is not run: {odd[0][:200]}",
            where={"folder": source, "expressions": len(odd)},
            hint="list the layers' names literally in target_modules, rank_pattern and alpha_pattern",
        )


def _read_tensors(source: Path) -> dict[str, Tensor]:
    path = source / TENSORS
    if not path.is_file():
        raise NotFoundError(f"'{source}' lacks {TENSORS}", hint="copy the folder anew")
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError) as problem:
        raise _unfit(f"{TENSORS} is damaged: {problem}", source) from problem
    bad = [
        key for key, t in tensors.items() if not t.is_floating_point() or not bool(torch.isfinite(t).all())
    ]
    if bad:
        raise _unfit(f"{len(bad)} tensors hold values that are no finite numbers, first '{bad[0]}'", source)
    return tensors


def _paths(tensors: Mapping[str, Tensor], source: Path) -> list[str]:
    """The adapted layers, from the tensors' names; a name of any other form belongs to nothing."""
    form = re.compile(re.escape(_PREFIX) + r"(?P<path>[^\s]+?)\.(lora_[AB]\.weight|ia3_l)")
    found = {key: form.fullmatch(key) for key in tensors}
    extra = [key for key, match in found.items() if match is None]
    if extra or not found:
        raise _unfit(
            f"{len(extra)} tensors belong to nothing, first '{extra[0]}'" if extra else "no tensor", source
        )
    return list(dict.fromkeys(match["path"] for match in found.values() if match))


def _method(config: Mapping[str, Any], paths: list[str], source: Path) -> Method:
    used = [key for key in _UNSUPPORTED if config.get(key)]
    used += ["bias"] if config.get("bias") not in (None, "none") else []
    init = str(config.get("init_lora_weights", "")).lower()
    used += [f"init_lora_weights = '{init}'"] if init.startswith(_CHANGES_BASE) else []
    if used:
        raise _unfit(f"the adapter uses what this does not read: {', '.join(used)}", source)
    kind = config.get("peft_type")
    if kind == "LORA":
        # PEFT takes the first pattern that matches, LoRA here the last suffix.
        tables = [
            dict(reversed((config.get(key) or {}).items())) for key in ("rank_pattern", "alpha_pattern")
        ]
        return LoRA(
            rank=config.get("r", 8),
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            rank_stabilized=bool(config.get("use_rslora")),
            ranks=tables[0],
            alphas=tables[1],
        )
    if kind == "IA3":
        inner = config.get("feedforward_modules") or []
        return IA3(feed_forward=tuple(path for path in paths if any(matches(path, entry) for entry in inner)))
    raise _unfit(f"peft_type {kind!r} is not read; LORA and IA3 are", source)


def _require_same_targets(
    model: nn.Module, config: Mapping[str, Any], paths: list[str], source: Path
) -> None:
    targets = config.get("target_modules")
    if not isinstance(targets, list):
        return
    modules = [path for path, module in model.named_modules() if kind_of(module) is not None]
    named = {path for path in modules if any(matches(path, target) for target in targets)}
    missing, extra = sorted(named - set(paths)), sorted(set(paths) - named)
    if missing:
        raise _unfit(f"{len(missing)} target layers have no tensors, first '{missing[0]}'", source)
    if extra:
        raise _unfit(
            f"{len(extra)} layers have tensors but are no target of this model, first '{extra[0]}'", source
        )


def _fill(handle: Handle, tensors: Mapping[str, Tensor], source: Path) -> None:
    wanted: dict[str, Tensor] = {}
    for path, adapter in handle.adapters.items():
        wanted.update(_foreign_names(path, adapter))
    missing, extra = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or extra:
        word = f"'{missing[0]}' is missing" if missing else f"'{extra[0]}' belongs to nothing"
        raise _unfit(f"{word} ({len(missing)} missing, {len(extra)} too many)", source)
    for key, value in wanted.items():
        if value.shape != tensors[key].shape:
            found, expected = tuple(tensors[key].shape), tuple(value.shape)
            raise _unfit(f"'{key}' has shape {found}; its settings and layer ask for {expected}", source)
        with torch.no_grad():
            value.copy_(tensors[key])


def _unfit(problem: str, source: Path) -> CheckpointError:
    return CheckpointError(
        problem,
        where={"folder": source},
        hint="export it anew for this base, with settings that are read here",
    )
