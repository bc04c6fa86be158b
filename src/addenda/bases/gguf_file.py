"""Turn a GGUF file into a model folder, once.

The header is read within bounds first (`gguf_header`). The conversion itself runs in a child process
(`gguf_convert`): its memory goes back to the machine when it ends, a crash of a foreign parser is an error here and
not the end of the session, and what libraries print does not reach the terminal.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from addenda.bases.gguf_header import GGUFHeader, read_header
from addenda.bases.gguf_pack import packing_problem
from addenda.core.progress import OnProgress, Progress
from addenda.errors import BaseModelError, OutOfMemory

__all__ = ["CONVERTER_VERSION", "KEEP_DENSE", "Form", "convert", "converted_bytes", "examine"]

Form = Literal["dense", "packed"]
KEEP_DENSE = "keep the weights dense: --set base.weights=dense"

CONVERTER_VERSION = 1
"""Part of the cache folder's name: raised whenever a conversion would write something else."""


def examine(path: Path) -> GGUFHeader:
    """Return the header of a GGUF file that can be converted.

    Raises:
        BaseModelError: also where the file needs something the conversion would silently leave out.
    """
    header = read_header(path)
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    factors = [tensor.name for tensor in header.tensors if tensor.name.startswith("rope_f")]
    if (scaling != "none" or factors) and header.architecture != "gpt-oss":
        raise BaseModelError(
            f"this GGUF file stretches its positions ('{factors[0] if factors else scaling}'), which is not read here",
            where={"file": path, "architecture": header.architecture},
            hint="take the model as a Hugging Face directory with safetensors",
        )
    return header


def converted_bytes(header: GGUFHeader, form: Form) -> int:
    """Upper bound of the disk space the converted folder takes."""
    packed = sum(tensor.bytes for tensor in header.tensors)
    return (4 * header.elements if form == "dense" else packed) + 64 * 2**20


def convert(
    path: Path, folder: Path, *, form: Form = "dense", on_progress: OnProgress | None = None
) -> dict[str, str]:
    """Write the model in GGUF file ``path`` into ``folder`` in Hugging Face layout.

    Packed weights are taken over byte for byte, rows reordered where transformers has them in another order. Else
    weights are dequantised and stored in the first of these that holds them: bfloat16 or float16 if every value fits
    exactly, float16 if none overflows (values rounded by at most 2^-11 of themselves, far below the 4- and 5-bit
    steps they come from; below 6e-5 by at most 3e-8), else float32.

    Returns:
        Facts for the manifest: ``stored`` (the dtype) and ``tokenizer_note`` (empty unless something is amiss).

    Raises:
        BaseModelError: it cannot be converted, or not be kept packed.
    """
    header = examine(path)
    if form == "packed" and (problem := packing_problem(header)):
        raise BaseModelError(
            f"these weights cannot stay packed: {problem}", where={"file": path}, hint=KEEP_DENSE
        )
    command = [
        sys.executable,
        "-m",
        "addenda.bases.gguf_convert",
        str(path.absolute()),
        str(folder.absolute()),
        form,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUTF8": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    # An empty working directory: '-m' puts it first on the import path.
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as errors:
        place: dict[str, Any] = {
            "cwd": empty,
            "env": environment,
            "stdin": subprocess.DEVNULL,
            "stderr": errors,
        }
        with subprocess.Popen(command, stdout=subprocess.PIPE, **place) as child:
            try:
                facts = _follow(child, on_progress)
            except BaseException:
                child.kill()
                raise
        errors.seek(0)
        said = errors.read().decode("utf-8", errors="replace").strip().splitlines()
    if child.returncode:
        raise _failed(path, header, child.returncode, said, form)
    return facts


def _follow(child: subprocess.Popen[bytes], on_progress: OnProgress | None) -> dict[str, str]:
    """Pass the child's progress on until it closes its output; return the facts it reported."""
    facts: dict[str, str] = {}
    for line in child.stdout or ():
        event = json.loads(line)
        facts.update(event.get("facts", {}))
        if on_progress and "task" in event:
            on_progress(Progress(f"convert: {event['task']}", event["done"], event["total"], "steps"))
    return facts


def _failed(path: Path, header: GGUFHeader, status: int, said: list[str], form: Form) -> Exception:
    where = {
        "file": path,
        "architecture": header.architecture,
        "converter said": said[-1] if said else "nothing",
    }
    if status in (-9, 137) or any("MemoryError" in line or "DefaultCPUAllocator" in line for line in said):
        return OutOfMemory(
            "the machine ran out of memory converting a GGUF file",
            where=where,
            hint="convert it on a machine with more, or take a smaller model; about 5 bytes per parameter are needed",
        )
    return BaseModelError(
        f"the GGUF file cannot be converted (exit status {status})",
        where=where,
        hint=KEEP_DENSE
        if form == "packed"
        else "transformers reads some GGUF architectures only; else take the model as safetensors",
    )
