"""Refuse a model folder that could run code: read its settings ourselves before any library does.

A ``config.json`` is a stranger's text. Some of its keys have made libraries import or download code (``auto_map``,
CVE-2026-22807; ``_attn_implementation_internal``, CVE-2026-4372; ``trust_remote_code``, CVE-2026-5241), and pickled
weights run code by design. None of that is ever needed to adapt a model, so it is refused, not asked about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from addenda.errors import BaseModelError, NotFoundError, UnsafeError

__all__ = ["PICKLES", "check_settings", "read_object", "weight_files"]

MAX_JSON = 16 * 2**20
"""Bytes of a settings file."""

_CODE_KEYS = {
    "_attn_implementation_internal": "it can name code to download",
    "_experts_implementation_internal": "it can name code to download",
    "auto_map": "it names Python code in the repository",
    "custom_code": "it names code to run",
    "custom_generate": "it names code to run",
    "custom_pipelines": "it names Python code in the repository",
    "kernel_config": "it names code to download",
    "transformers_weights": "it names another weight file",
    "trust_remote_code": "whether to run foreign code is not the file's to say",
    "use_kernels": "it asks for code to be downloaded",
}
_CHOICE_KEYS = {
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
}
_LAYOUT = "a model folder holds config.json, model.safetensors (or its shards and index) and tokenizer.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``.

    Raises:
        BaseModelError: it is missing, too large, not JSON, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise BaseModelError(
                f"'{path.name}' is larger than {MAX_JSON:,} bytes",
                where={"file": path},
                hint="settings are small: this file is not what its name says",
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotFoundError(
            f"'{path.name}' is missing", where={"folder": path.parent}, hint=_LAYOUT
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(
            f"'{path.name}' is not readable JSON: {error}", where={"file": path}, hint="fetch the file again"
        ) from error
    if not isinstance(value, dict):
        raise BaseModelError(
            f"'{path.name}' holds no JSON object", where={"file": path}, hint="fetch the file again"
        )
    return value


def check_settings(path: Path) -> dict[str, Any]:
    """Return the settings in ``path`` after refusing every key, at any depth, that could bring code along.

    Raises:
        UnsafeError: naming every such key at once.
    """
    settings = read_object(path)
    found = [f"'{place}' ({why})" for place, why in _dangers(settings, "")]
    if found:
        raise UnsafeError(
            f"'{path.name}' could run foreign code: {', '.join(found)}",
            where={"file": path},
            hint="if the model needs no code of its own, remove these keys from your copy of the file",
        )
    return settings


def _dangers(value: Any, place: str) -> Iterator[tuple[str, str]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        inside = f"{place}.{key}" if place else str(key)
        if key in _CODE_KEYS and inner is not None:
            yield inside, _CODE_KEYS[key]
        elif key in _CHOICE_KEYS and inner is not None and not _is_plain_choice(inner):
            yield inside, "it can name code to download"
        else:
            yield from _dangers(inner, inside)


def _is_plain_choice(value: Any) -> bool:
    """Whether an implementation is named by a bare word such as 'sdpa', not by a repository."""
    return isinstance(value, str) and re.fullmatch(r"[a-z0-9_]+", value) is not None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, as its index names them or the single one.

    Raises:
        UnsafeError: weights only as pickles, or an index that names a path outside the folder.
        BaseModelError: an index that names no file, or one that is missing.
        NotFoundError: no weights at all.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UnsafeError(
            f"the weights come only as {', '.join(repr(name) for name in pickles[:3])}, which can run code when read",
            where={"folder": folder},
            hint="convert them where you trust them: load with transformers, then save_pretrained() writes safetensors",
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    raise NotFoundError(
        "no 'model.safetensors' and no 'model.safetensors.index.json'",
        where={"folder": folder, **({"other safetensors files": ", ".join(others)} if others else {})},
        hint=_LAYOUT,
    )


def _shards(index: Path) -> list[Path]:
    mapping = read_object(index).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise BaseModelError(
            f"'{index.name}' has no 'weight_map'", where={"file": index}, hint="fetch the file again"
        )
    names = sorted({str(name) for name in mapping.values()})
    for name in names:
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise UnsafeError(
                f"'{index.name}' names '{name}', which is no safetensors file of its folder",
                where={"file": index},
                hint="an index names plain file names; do not use this one unless you know who made it",
            )
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise BaseModelError(
            f"'{index.name}' names files that are missing: {', '.join(missing)}",
            where={"folder": index.parent},
            hint="fetch the missing files",
        )
    return [index.parent / name for name in names]
