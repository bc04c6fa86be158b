"""A model folder written again with some of its tensors in other forms; the others keep their bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from addenda.bases.guard import read_object, weight_files
from addenda.export.tensor_file import TensorFile

__all__ = ["Change", "differences", "read_tensor", "rewrite", "tensor_names"]

Change = Callable[[str], Mapping[str, Tensor] | None]
"""From the name of a tensor to those that stand in its place, by name; None for the tensor as it is."""

_INDEX = "model.safetensors.index.json"
_PARTS, _SUFFIX = 4, 64
"""How many tensors come of one that was not packed, and how much longer their names are; at most."""


def tensor_names(folder: Path) -> list[str]:
    """Return the names of a model folder's tensors."""
    return [name for path in weight_files(folder) for name in _names(path)]


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def read_tensor(folder: Path, name: str) -> Tensor:
    """Return one of a model folder's tensors.

    Raises:
        KeyError: there is none of that name.
    """
    for path in weight_files(folder):
        if name in _names(path):
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
    raise KeyError(name)


def rewrite(
    source: Path, target: Path, change: Change, settings: Callable[[dict[str, Any]], dict[str, Any]]
) -> Iterator[Path]:
    """Write a model folder's weights and configuration, one tensor after another.

    Args:
        source: a model folder.
        target: an existing folder.
        change: what becomes of each tensor.
        settings: what becomes of ``config.json``.

    Yields:
        Each weight file when it is written.
    """
    places: dict[str, str] = {}
    total = 0
    for path in weight_files(source):
        stored = _names(path)
        names = _PARTS * sum(len(name) + _SUFFIX for name in stored)
        with TensorFile(target / path.name, names=names, count=_PARTS * len(stored)) as file:
            for name, tensor in _changed(path, change):
                file.add(name, tensor)
                places[name] = path.name
                total += tensor.nbytes
        yield target / path.name
    if len(set(places.values())) > 1:
        _write(target / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    _write(target / "config.json", settings(read_object(source / "config.json")))
    generation = source / "generation_config.json"
    if generation.is_file():
        _write(target / generation.name, read_object(generation))


def _changed(path: Path, change: Change) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no mapping)
            made = change(name)
            if made is None:
                made = {name: file.get_tensor(name)}
            yield from ((each, tensor.contiguous()) for each, tensor in made.items())


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def differences(
    source: Path, written: Path, change: Change
) -> Iterator[tuple[str, Tensor | None, Tensor | None]]:
    """Yield the tensors of a written folder that are not what was meant: name, as meant, as found.

    One that is missing, or should not be there, is None on its side.

    Raises:
        AddendaError: there are no weight files.
        SafetensorError: one is damaged.
    """
    with ExitStack() as opened:
        files = {
            name: file
            for path in weight_files(written)
            for file in [opened.enter_context(safe_open(path, framework="pt"))]
            for name in file.keys()  # noqa: SIM118
        }
        wanted = set()
        for path in weight_files(source):
            for name, tensor in _changed(path, change):
                wanted.add(name)
                found = files[name].get_tensor(name) if name in files else None
                if found is None or found.dtype != tensor.dtype or not torch.equal(found, tensor):
                    yield name, tensor, found
        yield from ((name, None, files[name].get_tensor(name)) for name in files if name not in wanted)
