"""A model file that llama.cpp and Ollama load, with the adapter folded into the weights."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar

from torch import nn

from addenda.bases import LoadedBase
from addenda.core.planning import Plan
from addenda.export.ends import tied_ends
from addenda.export.format import Format
from addenda.export.gguf.merging import AS_BASE, TYPES, audit_merged, write_merged_gguf
from addenda.export.gguf.origin import origin_of, why_no_head, why_no_origin, why_no_place
from addenda.export.job import Job
from addenda.export.ollama import modelfile
from addenda.export.runtime import Runtime
from addenda.export.runtimes.gelu_table import with_gelu_table
from addenda.export.runtimes.llama_cpp import require_llama_cpp, run_in_llama_cpp

__all__ = ["FILE", "FORMAT", "GGUF"]

FILE = "model.gguf"

_USAGE = """```sh
llama-server -m {file}
ollama create {name} -f Modelfile
```"""


class GGUF(Format):
    """One file with weights, tokenizer and template."""

    types: ClassVar[tuple[str, ...]] = TYPES
    extra = "llamacpp"
    library = "gguf"

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        found = [problem for problem in (why_no_origin(base), why_no_place(planned)) if problem]
        if not planned.method.mergeable:
            found.append(f"method '{planned.method.name}' cannot be merged")
        tied = tied_ends([row.path for row in planned.rows], model)
        if tied and (why := why_no_head(base)):
            found.append(f"'{tied[0]}' shares its weight, merging would change both, and {why}")
        return found

    def space(self, job: Job) -> int:
        """The file, and for the gate one in float32; with a head of its own where tied ends part."""
        parting = tied_ends(job.handle.paths, job.model)
        head = max((job.handle.view(path).d_in * job.handle.view(path).d_out for path in parting), default=0)
        return 8 * (job.numbers + head) + 2**26

    def write(self, job: Job, folder: Path) -> None:
        write_merged_gguf(job, origin_of(job.base), folder / FILE, job.type or AS_BASE)
        if job.base:
            (folder / "Modelfile").write_text(modelfile(job.base, FILE), encoding="utf-8")

    def drifts(self, job: Job) -> bool:
        return True  # llama.cpp's usual settings round, whatever the file holds

    def rounding(self, model: nn.Module) -> AbstractContextManager[None]:
        return with_gelu_table(model)

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        require_llama_cpp()
        if not exact:
            return run_in_llama_cpp(job, folder / FILE, exact=False)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".twin-") as place:
            twin = Path(place) / FILE
            write_merged_gguf(job, origin_of(job.base), twin, "f32")
            return run_in_llama_cpp(job, twin, exact=True)  # mapped: the file may go while it is open

    def audit(self, job: Job, folder: Path) -> list[str]:
        return audit_merged(job, origin_of(job.base), folder / FILE, job.type or AS_BASE)

    def usage(self, job: Job) -> str:
        return _USAGE.format(file=FILE, name=job.handle.name)


FORMAT = GGUF()
