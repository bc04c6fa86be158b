"""An adapter file that llama.cpp loads beside the base's GGUF file."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.bases.cache import sha256_of
from addenda.bases.gguf_header import read_header
from addenda.core.planning import Plan
from addenda.core.whole import is_whole
from addenda.errors import BaseModelError, CheckpointError, UnsafeError
from addenda.export.ends import tied_ends
from addenda.export.format import Format
from addenda.export.gguf.adapter import ALPHA, read_adapter, write_adapter
from addenda.export.gguf.copying import write_like
from addenda.export.gguf.factors import Factors, factors_of, trimmed
from addenda.export.gguf.origin import Exact, Origin, origin_of, why_no_origin, why_no_place
from addenda.export.gguf.told import differences
from addenda.export.job import Job
from addenda.export.runtime import Runtime
from addenda.export.runtimes.gelu_table import with_gelu_table
from addenda.export.runtimes.llama_cpp import require_llama_cpp, run_in_llama_cpp

__all__ = ["FILE", "FORMAT", "GGUFLoRA"]

FILE = "adapter.gguf"

_USAGE = """The base's GGUF file goes by the SHA-256 `{sha256}`.

```sh
llama-server -m BASE.gguf --lora {file}
llama-cli -m BASE.gguf --lora-scaled {file}:0.5
```"""


class GGUFLoRA(Format):
    """The factors of each layer's change; the base stays one file for many adapters."""

    extra = "llamacpp"
    library = "gguf"

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        found = [problem for problem in (why_no_origin(base), why_no_place(planned)) if problem]
        whole = [row.path for row in planned.rows if is_whole(planned.method, row.path)]
        if whole:
            found.append(f"a GGUF adapter holds no layer that is trained whole, as '{whole[0]}' is")
        other = [row.path for row in planned.rows if not row.low_rank and row.path not in whole]
        if other:
            found.append(
                f"a GGUF adapter holds products of two factors alone; '{planned.method.name}' is more at '{other[0]}'"
            )
        if tied := tied_ends([row.path for row in planned.rows], model):
            found.append(
                f"'{tied[0]}' shares its weight, and llama.cpp takes an adapter for neither: it has no head to add "
                "one to, and one of the embedding ends it where the head reads that"
            )
        return found

    def space(self, job: Job) -> int:
        """The adapter, and for the gate the base in float32."""
        return super().space(job) + 4 * job.numbers + 2**26

    def write(self, job: Job, folder: Path) -> None:
        write_adapter(job.handle, origin_of(job.base), folder / FILE, base_name=job.title)
        job.say("write the adapter", 1, 1, "files")

    def drifts(self, job: Job) -> bool:
        return True  # its numbers are exact; the base's own file and llama.cpp's usual settings are not

    def rounding(self, model: nn.Module) -> AbstractContextManager[None]:
        return with_gelu_table(model)

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        require_llama_cpp()
        origin = origin_of(job.base)
        if not exact:
            return run_in_llama_cpp(job, origin.path, folder / FILE, exact=False)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".twin-") as place:
            twin = Path(place) / "base.gguf"
            write_like(origin.path, twin, Exact(job.model, origin), on_progress=job.on_progress)
            return run_in_llama_cpp(
                job, twin, folder / FILE, exact=True
            )  # mapped: the file may go while it is open

    def audit(self, job: Job, folder: Path) -> list[str]:
        return audit_adapter(job, folder / FILE)

    def usage(self, job: Job) -> str:
        return _USAGE.format(file=FILE, sha256=sha256_of(origin_of(job.base).path))


def audit_adapter(job: Job, file: Path) -> list[str]:
    """Read an adapter file back, and return what is other than the adapter in memory."""
    origin = origin_of(job.base)
    meant = {
        path: kept
        for path, each in factors_of(job.handle).items()
        if (kept := trimmed(each) if path in origin.experts else each)
    }
    try:
        found = read_adapter(file, origin)
    except (BaseModelError, CheckpointError, UnsafeError) as error:
        return [error.message]
    if _alpha_missing(file):
        return [f"'{ALPHA}' is missing, so that llama.cpp does not scale"]
    orders = {f"{path} B": order for path in meant if (order := _order(origin, path)) is not None}
    return differences(
        {name: tensor for path, each in meant.items() for name, tensor in _named(path, each).items()},
        {name: tensor for path, each in found.items() for name, tensor in _named(path, each).items()},
        orders,
    )


def _named(path: str, each: Factors) -> dict[str, Tensor]:
    return {f"{path} A": each.A, f"{path} B": each.B * each.scaling}


def _order(origin: Origin, path: str) -> Tensor | None:
    way = origin.ways.get(f"{path}.weight")
    return None if way is None else way.order


def _alpha_missing(file: Path) -> bool:
    return ALPHA not in read_header(file).metadata


FORMAT = GGUFLoRA()
