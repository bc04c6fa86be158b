"""All adapters of a model in one folder, with what is active: loaded back, the model answers with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from addenda.core.activating import activate, active_composition, from_settings
from addenda.core.handle import Handle, handles
from addenda.core.state import load, publish, save
from addenda.errors import AddendaError, CheckpointError, MethodError, NotFoundError

__all__ = ["load_all", "save_all"]

_INDEX = "adapters.json"
_LIMIT = 2**20


def save_all(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    provenance: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write every adapter of the model, in folders of their own, and what is active; atomically.

    Args:
        model: carries at least one adapter, none of them merged.
        folder: where to write; a folder written by this function is replaced, any other content is refused.
        provenance: for some adapters by name, facts as for `addenda.save`.

    Raises:
        NotFoundError: the model carries no adapter.
        MethodError: one of them is merged.
        CheckpointError: a value is not finite, or the folder holds something else.

    Example:
        >>> import addenda, tempfile
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> for name in ("law", "style"):
        ...     _ = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name=name)
        >>> path = addenda.save_all(model, tempfile.mkdtemp() + "/adapters")
        >>> sorted(entry.name for entry in path.iterdir())
        ['adapters.json', 'law', 'style']
    """
    on_model, target = handles(model), Path(folder)
    if not on_model:
        raise NotFoundError("the model carries no adapter", hint="attach one first")
    merged = [name for name, handle in on_model.items() if handle.merged]
    if merged:
        raise MethodError(
            f"adapter '{merged[0]}' is merged", hint="unmerge it first: its own weights are saved"
        )
    if target.exists() and not (
        target.is_dir() and ((target / _INDEX).exists() or not any(target.iterdir()))
    ):
        raise CheckpointError(
            f"'{target}' exists and was not written by save_all", hint="choose another folder"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        for name in on_model:
            save(model, beside / name, name=name, provenance=(provenance or {}).get(name))
        index = {
            "format_version": 1,
            "adapters": list(on_model),
            "active": active_composition(model).settings(),
        }
        (beside / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        publish(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def load_all(
    model: nn.Module, folder: str | os.PathLike[str], *, trainable: bool = False
) -> dict[str, Handle]:
    """Load what `save_all` wrote, in the order of attaching, and activate what was active.

    Args:
        model: the base, without adapters of the same names.
        folder: written by `save_all`.
        trainable: whether the adapters should train on.

    Returns:
        The handles by name.

    Raises:
        NotFoundError: the folder or one of its adapters is missing.
        CheckpointError: a file is damaged, or belongs to another base. The model is then as it was.

    Example:
        >>> import addenda, tempfile
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> handle = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name="law")
        >>> folder = addenda.save_all(model, tempfile.mkdtemp() + "/adapters")
        >>> handle.detach()
        >>> addenda.load_all(model, folder)
        {'law': <Handle 'law': lora, 1 layers, 24 parameters, active>}
    """
    source = Path(folder)
    index = _index(source)
    loaded: dict[str, Handle] = {}
    try:
        for name in index["adapters"]:
            loaded[name] = load(model, source / name, name=name, trainable=trainable)
        activate(model, from_settings(index["active"]))
    except BaseException:
        for handle in reversed(loaded.values()):
            handle.detach()
        raise
    return loaded


def _index(source: Path) -> dict[str, Any]:
    path = source / _INDEX
    if not path.is_file():
        raise NotFoundError(
            f"'{source}' holds no {_INDEX}",
            hint="name a folder written by addenda.save_all, or use addenda.load",
        )
    try:
        if path.stat().st_size > _LIMIT:
            raise ValueError("it is too large")
        index = json.loads(path.read_text(encoding="utf-8"))
        names, settings = index["adapters"], index["active"]
        if index["format_version"] != 1 or not isinstance(settings, dict):
            raise ValueError("it has another form")
        if not names or any(
            not isinstance(name, str) or "/" in name or name.startswith(".") for name in names
        ):
            raise ValueError("it names adapters that no folder can hold")
    except (ValueError, KeyError, TypeError, RecursionError, AddendaError) as problem:
        raise CheckpointError(
            f"'{path}' is not readable: {problem}", where={"file": path}, hint="copy the folder anew"
        ) from problem
    return dict(index)
