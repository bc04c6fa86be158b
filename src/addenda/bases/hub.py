"""Load a model from the Hugging Face hub, straight from the hub's own cache: no second copy of the weights.

``HF_HOME``, ``HF_HUB_CACHE``, ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` mean what they mean to
huggingface_hub. The settings files are fetched and checked before any weights are.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.bases.directory import open_directory
from addenda.bases.fetch import is_offline
from addenda.bases.guard import PICKLES, check_settings
from addenda.bases.loaded import LoadedBase
from addenda.core.progress import OnProgress, Progress
from addenda.errors import NotFoundError, UnsafeError

if TYPE_CHECKING:
    import torch

__all__ = ["load_from_hub"]

_SETTINGS = [
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",
]
_WEIGHTS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_TOKENIZER = [
    "tokenizer.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
]
_NESTED = ["*/*"]


def load_from_hub(
    repository: str,
    revision: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    offline: bool = False,
    weightless: bool = False,
    on_progress: OnProgress | None = None,
) -> LoadedBase:
    """Load ``org/name`` at ``revision`` (a branch, tag or commit; None: the main branch).

    `LoadedBase.source` names the commit, so that the same weights can be had again.

    Raises:
        NotFoundError: no such repository or revision, no access, or not cached while the hub is out of reach.
        UnsafeError: its files could run code, or its weights are pickles.
        BaseModelError: its files are damaged or do not fit each other.
    """
    folder, notes = _snapshot(
        repository, revision, offline=is_offline(asked=offline), on_progress=on_progress
    )
    return open_directory(
        folder,
        name=repository,
        source=f"{repository}@{folder.name}",
        dtype=dtype,
        notes=notes,
        weightless=weightless,
    )


def _snapshot(
    repository: str, revision: str | None, *, offline: bool, on_progress: OnProgress | None
) -> tuple[Path, tuple[str, ...]]:
    if offline:
        return _cached(repository, revision, "the network is off"), ()
    try:
        files = _listing(repository, revision)
    except _Unreachable as error:
        note = f"the hub was out of reach ({error}); what its cache held was used"
        return _cached(repository, revision, f"the hub is out of reach ({error})"), (note,)
    _require_safetensors(repository, files)
    settings = _download(repository, revision, _SETTINGS, on_progress=None)
    for name in _SETTINGS:
        if name.endswith(".json") and (settings / name).is_file():
            check_settings(settings / name)
    return _download(repository, revision, _SETTINGS + _WEIGHTS + _TOKENIZER, on_progress=on_progress), ()


class _Unreachable(Exception):
    """The hub did not answer; carries why, in a few words."""


def _listing(repository: str, revision: str | None) -> list[str]:
    """Return the names of the repository's files."""
    from huggingface_hub import HfApi, errors

    place = {"repository": repository, "revision": revision or "main"}
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=20)
    except errors.RevisionNotFoundError as error:
        hint = "give a branch, a tag or a commit of its page's history"
        raise NotFoundError(f"'{repository}' has no revision '{revision}'", where=place, hint=hint) from error
    except errors.GatedRepoError as error:
        hint = "accept its terms on its page, then set HF_TOKEN"
        raise NotFoundError(
            f"'{repository}' is gated and this account has no access", where=place, hint=hint
        ) from error
    except errors.RepositoryNotFoundError as error:
        hint = "see the spelling; for a private one set HF_TOKEN; a local folder of this name does not exist either"
        raise NotFoundError(
            f"the hub has no model '{repository}' you may read", where=place, hint=hint
        ) from error
    except errors.HFValidationError as error:
        hint = "an id looks like org/name"
        raise NotFoundError(
            f"'{repository}' is not a valid hub id: {error}", where=place, hint=hint
        ) from error
    except (OSError, errors.OfflineModeIsEnabled) as error:  # HTTP errors of the hub's are OSErrors
        raise _Unreachable(_brief(error)) from error
    except Exception as error:
        # The HTTP library (httpx, in some versions under another name) has its own tree of transport errors.
        if type(error).__module__.partition(".")[0].startswith("httpx"):
            raise _Unreachable(_brief(error)) from error
        raise
    return [sibling.rfilename for sibling in info.siblings or []]


def _brief(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _require_safetensors(repository: str, files: list[str]) -> None:
    top = [name for name in files if "/" not in name]
    if any(name.endswith(".safetensors") for name in top):
        return
    pickles = [name for name in top if name.endswith(PICKLES)]
    if pickles:
        raise UnsafeError(
            f"the weights of '{repository}' come only as {', '.join(map(repr, pickles[:3]))}, "
            "which can run code when read",
            hint="take a repository with safetensors",
        )
    raise NotFoundError(
        f"'{repository}' holds no safetensors weights",
        where={"files": ", ".join(sorted(top)[:12]) or "none"},
        hint="for a GGUF repository fetch the .gguf file and give its path",
    )


def _download(
    repository: str, revision: str | None, patterns: list[str], *, on_progress: OnProgress | None
) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        repository,
        revision=revision,
        allow_patterns=patterns,
        ignore_patterns=_NESTED,
        tqdm_class=_bar_class(f"fetch {repository}", on_progress),
    )
    return Path(folder)


def _cached(repository: str, revision: str | None, why: str) -> Path:
    """Return the snapshot folder the hub's cache holds for this revision."""
    from huggingface_hub import constants, errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                local_files_only=True,
                allow_patterns=_SETTINGS + _WEIGHTS + _TOKENIZER,
                ignore_patterns=_NESTED,
            )
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        raise NotFoundError(
            f"'{repository}' is not in the hub's cache and {why}",
            where={"revision": revision or "main", "cache": constants.HF_HUB_CACHE},
            hint="load it once with the network on, or give the path of a model folder",
        ) from error


def _bar_class(task: str, on_progress: OnProgress | None) -> Any:
    """Return a stand-in for tqdm that draws nothing and passes the bytes on."""
    from huggingface_hub.utils import tqdm

    most = 0.0

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **options: Any) -> None:
            nonlocal most
            # One bar counts files and up to two count bytes: follow the leading count of bytes.
            if on_progress and self.unit == "B" and self.n >= most:
                most = self.n
                on_progress(Progress(task, self.n, self.total or None, "bytes"))

    return Bar
