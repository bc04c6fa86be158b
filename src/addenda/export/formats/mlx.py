"""An adapter or a merged model that mlx-lm loads, for Apple silicon."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from addenda.bases import LoadedBase
from addenda.bases.loaded import vocabulary_of
from addenda.bases.registry import find
from addenda.core.planning import Plan
from addenda.errors import ExportError
from addenda.export.format import Format
from addenda.export.job import Job
from addenda.export.merged import merged_audit, write_merged
from addenda.export.mlx import adapter_audit, with_rope, write_adapter
from addenda.export.mlx.config import rope_of
from addenda.export.mlx.folder import layers_without
from addenda.export.runtime import Runtime
from addenda.export.runtimes.mlx import MLXRuntime

__all__ = ["FORMAT", "MLX"]

_ADAPTER = """```python
from mlx_lm import generate, load

model, tokenizer = load({source!r}, adapter_path="this folder")
answer = generate(model, tokenizer, prompt="...")
```

The base has to be a model folder whose `config.json` states `rope_theta` at the top level if its model has one:
mlx-lm computes with a default of its own where it is only told inside `rope_parameters`."""

_MERGED = """```python
from mlx_lm import generate, load

model, tokenizer = load("this folder")
answer = generate(model, tokenizer, prompt="...")
```"""


class MLX(Format):
    """An adapter beside its base, or one model folder without any."""

    types: ClassVar[tuple[str, ...]] = ("adapter", "float32", "bfloat16", "float16")
    extra = "mlx"
    library = "mlx"

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        found = []
        if not planned.method.mergeable:
            found.append(f"method '{planned.method.name}' cannot be merged, and mlx-lm has no such method")
        if base is None or base.kind != "causal-lm":
            found.append("mlx-lm runs causal language models alone")
        if getattr(model, "is_quantized", False):
            found.append("the base keeps weights that another library quantized, which mlx-lm does not read")
        return found

    def default_type(self, job: Job) -> str:
        terms = all(each.low_rank_term() is not None for each in job.handle.adapters.values())
        return "adapter" if terms and not layers_without(job.model, job.handle.paths) else "float32"

    def space(self, job: Job) -> int:
        tied = vocabulary_of(_loaded(job).model) * 4096
        return (6 if self.drifts(job) else 4) * (job.numbers + tied) + 2**24

    def write(self, job: Job, folder: Path) -> None:
        if job.type == "adapter":
            _loaded(job)
            write_adapter(job.handle, folder, base_name=_source(job))
        else:
            _write_model(job, folder, str(job.type))

    def drifts(self, job: Job) -> bool:
        return job.type in {"bfloat16", "float16"}

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        if job.type != "adapter" and (not exact or not self.drifts(job)):
            return MLXRuntime(folder)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".twin-") as place:
            _write_model(job, Path(place), "float32", adapted=job.type != "adapter")
            return MLXRuntime(Path(place), folder if job.type == "adapter" else None)

    def audit(self, job: Job, folder: Path) -> list[str]:
        if job.type == "adapter":
            return adapter_audit(job.handle, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        wrong = [
            f"config.json states {name} as {config.get(name)!r}, not {value!r}"
            for name, value in rope_of(job.model.config.to_dict()).items()  # type: ignore[operator, union-attr]
            if config.get(name) != value
        ]
        return wrong + merged_audit(job.handle, folder, getattr(torch, str(job.type)))

    def usage(self, job: Job) -> str:
        return _ADAPTER.format(source=_source(job)) if job.type == "adapter" else _MERGED


def _loaded(job: Job) -> LoadedBase:
    if job.base is None or job.base.kind != "causal-lm":
        raise ExportError(
            f"'{job.title}' is no causal language model that was loaded from files, which mlx-lm needs",
            hint="load it with addenda.load_base, or take --to onnx or --to executorch",
        )
    return job.base


def _source(job: Job) -> str:
    base = _loaded(job)
    return base.name if find(base.name) else base.source.partition("@")[0]


def _write_model(job: Job, folder: Path, dtype: str, *, adapted: bool = True) -> None:
    write_merged(
        _loaded(job),
        job.handle,
        folder,
        getattr(torch, dtype),
        adapted=adapted,
        on_progress=job.on_progress,
    )
    path = folder / "config.json"
    config = with_rope(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


FORMAT = MLX()
