"""Compile the C++ sources into one shared library, once for each machine, compiler and version of the sources."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from addenda.errors import KernelError
from addenda.folders import cache_root

__all__ = ["build", "built", "compiler"]

SOURCES = Path(__file__).parent / "source"
NATIVE = "native"
"""The instruction set of the machine that compiles."""

FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared")
OPTIONAL_FLAGS = ("-fopenmp",)
"""Left out where the compiler refuses them: the kernels are then right, on one core."""

HINT = "install g++ 12 or newer, or clang++, or name one by CXX; without it plain PyTorch does the same"

TIME_LIMIT = 180.0
"""Seconds after which a compiler is given up."""


@functools.cache
def compiler() -> str | None:
    """Return the path of the C++ compiler: ``$CXX``, else the first of c++, g++ and clang++; None where none is."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def built() -> Path | None:
    """Return the library if it was compiled before, else None."""
    path = _library_path()
    return path if path and path.is_file() else None


def build(instructions: str = NATIVE) -> Path:
    """Return the library, compiling it if need be (some seconds).

    Args:
        instructions: the instruction set it may use, by the compiler's name for it.

    Raises:
        KernelError: there is no compiler, it fails, or the result cannot be kept.
    """
    path = _library_path(instructions)
    if path is None:
        raise KernelError("no C++ compiler found", hint=HINT)
    if path.is_file():
        return path
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as work:
            made = Path(work) / path.name
            _compile(made, instructions)
            made.replace(path)
    except OSError as error:
        raise KernelError(
            f"the compiled kernels cannot be kept: {error}",
            where={"file": path},
            hint="free some space there, or let ADDENDA_HOME name another folder",
        ) from error
    return path


def _compile(target: Path, instructions: str) -> None:
    sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
    said = ""
    for optional in (OPTIONAL_FLAGS, ()):
        command = [str(compiler()), *_flags(instructions), *optional, *sources, "-o", str(target)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise KernelError(
                f"the compiler cannot be run: {error}", where={"compiler": compiler()}, hint=HINT
            ) from error
        if done.returncode == 0:
            return
        said = done.stderr.strip()
    first = next((line for line in said.splitlines() if "error" in line), said[:200])
    raise KernelError(
        "the kernels cannot be compiled", where={"compiler": compiler(), "it said": first}, hint=HINT
    )


def _flags(instructions: str) -> tuple[str, ...]:
    # The sources say themselves what may be contracted, which Clang does not heed at 'fast' and GCC only there.
    contraction = "on" if "clang" in _compiler_version() else "fast"
    return (*FLAGS, f"-ffp-contract={contraction}", f"-march={instructions}")


@functools.cache
def _library_path(instructions: str = NATIVE) -> Path | None:
    if compiler() is None:
        return None
    digest = hashlib.sha256()
    for part in (*_flags(instructions), *OPTIONAL_FLAGS, _compiler_version(), _processor()):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return cache_root() / "kernels" / f"{digest.hexdigest()[:24]}{suffix}"


@functools.cache
def _compiler_version() -> str:
    try:
        done = subprocess.run(
            [str(compiler()), "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))
