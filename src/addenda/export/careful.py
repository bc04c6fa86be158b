"""A merge into few bits for adapters that were trained without them: codes that make up for each other's errors.

Rounding every number to the nearest code loses most of an adapter, whose changes are smaller than half a step. Here
the weights of a row are rounded one after another, and those to come take over what the rounding did to the layer's
output on calibration rows (Frantar et al. 2022, arXiv:2210.17323). Within a byte budget the layers that lose most are
kept at Q8_0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from addenda.bases import formats
from addenda.bases.formats import Grid, WeightFormat
from addenda.core.attaching import install_adapters
from addenda.core.composition import bare_of
from addenda.core.contract import Adapter, Base
from addenda.core.handle import Handle
from addenda.core.observations import Observer
from addenda.core.observing import Batch, watch
from addenda.core.progress import OnProgress, Progress
from addenda.core.through import merged_rows
from addenda.errors import ConfigError, ExportError
from addenda.export.job import Job
from addenda.export.probes import answer

__all__ = [
    "GROWTH",
    "MergedLayer",
    "answering_as",
    "careful_merge",
    "careful_rows",
    "compensated",
    "kept_wide",
    "mean_kl",
    "plain_merge",
    "widened",
]

_DAMPING = 0.01
"""Share of the mean square of an input that is added to each, so that inputs never seen leave the rest alone."""
_NARROWER = (-0.4, 0.4, 1.1, 2.0, 3.0)
"""By how many steps the range of a block's codes is made narrower than the writer makes it, or wider; all are tried.
The writer's own range is left out: where the base came from a file of that format, it gives each weight the code that
it had, and what the adapter changed of it is gone. Where a row is one block, one range is taken."""
_COLUMNS = 64
"""That are rounded before the others are told, where a row is one block."""


GROWTH = 0.1
"""Share of its size by which a file may grow for layers that are kept at Q8_0."""
_ASKED = 256
"""Positions of calibration rows, or a row more, at which a layer at Q8_0 is tried; each layer takes that long."""


@dataclass(frozen=True)
class MergedLayer:
    """A layer's weight with the adapter folded in, as a file holds it."""

    format: str
    rows: Tensor
    """``(d_out, bytes of a row)`` uint8, in the model's order of rows."""
    bias: Tensor | None
    """``(d_out,)``, or None."""

    def weight(self, d_in: int) -> Tensor:
        """Return what is read back, ``(d_out, d_in)`` float32."""
        return formats.get(self.format).dequantize(self.rows, d_in)


def plain_merge(handle: Handle, to: str) -> dict[str, MergedLayer]:
    """Return each layer rounded as the format's writer rounds; an adapter trained through the format loses nothing.

    Args:
        handle: an adapter, not merged.
        to: name of the format.
    """
    name = formats.get(to.upper()).name
    return {
        path: MergedLayer(name, merged_rows(handle, path, name), _bias(handle, path)) for path in handle.paths
    }


def careful_merge(
    handle: Handle,
    to: str,
    batches: Sequence[Batch],
    *,
    paths: Iterable[str] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, MergedLayer]:
    """Return each linear layer rounded so that its outputs on calibration rows change least.

    Each layer keeps the (d_in, d_in) products of its inputs meanwhile.

    Args:
        handle: an active adapter, trained beside the weights as they are.
        to: name of a format whose codes are numbers times a block's scale: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, NF4,
            INT8.
        batches: of the data, as for `addenda.observe`; some thousand tokens.
        paths: of the layers; None for all.
        on_progress: told how many batches and layers are done.

    Raises:
        ConfigError: the format's scales cannot be chosen here, or the adapter was trained through a rounding.
    """
    entry = formats.get(to.upper())
    if entry.grid is None:
        able = ", ".join(name for name in formats.names() if formats.get(name).grid)
        raise ConfigError(
            f"the scales of {entry.name} cannot be chosen here", hint=f"a careful merge writes {able}"
        )
    if handle.through is not None:
        raise ConfigError(
            f"'{handle.name}' is trained through {handle.through}: its merge is exact as it is",
            hint="merge it plainly, into that format",
        )
    # An embedding has no inputs to weigh errors by: each of its columns is one token's alone.
    asked = handle.paths if paths is None else paths
    views = {path: view for path in asked if (view := handle.view(path)).pointwise}
    grams = {path: _Gram(view.d_in) for path, view in views.items()}
    watch(handle.model, handle.method, views, grams, batches=batches, on_progress=on_progress)
    made: dict[str, MergedLayer] = {}
    for path, view in views.items():
        with torch.no_grad():
            folded, bias = handle.adapters[path].fold(view.exact_weight(), view.bias())
        made[path] = MergedLayer(entry.name, compensated(folded, grams.pop(path).total, entry), bias)
        if on_progress:
            on_progress(Progress("round with compensation", len(made), len(views), "layers"))
    return made


def careful_rows(job: Job, to: str, path: str, paths: Iterable[str] | None = None) -> Tensor:
    """Return the raw rows of a layer, rounded with care by a job's calibration rows; all layers are at the first call.

    Raises:
        ExportError: there are no such rows.
    """
    if not job.calibration:
        raise ExportError(
            "a careful merge needs rows of the task to round by",
            hint="name some: --calibrate DATA, such as what it was trained on",
        )
    if to not in job.kept:
        made = careful_merge(job.handle, to, job.calibration, paths=paths, on_progress=job.on_progress)
        job.kept[to] = made
    rows: Tensor = job.kept[to][path].rows
    return rows


def _bias(handle: Handle, path: str) -> Tensor | None:
    view = handle.view(path)
    with torch.no_grad():
        return handle.adapters[path].fold(view.exact_weight(), view.bias())[1]


class _Gram(Observer):
    """The sum of x x^T over a layer's inputs."""

    def __init__(self, d_in: int) -> None:
        self.total = torch.zeros(d_in, d_in)

    def see(self, seen: Tensor) -> None:
        self.total.addmm_(seen.t(), seen)

    def found(self) -> dict[str, Tensor]:
        return {"gram": self.total}


# ------------------------------------------------------------------------------------------------------ compensation


def compensated(weight: Tensor, gram: Tensor, entry: WeightFormat) -> Tensor:
    """Round a weight so that (W - Q) X is small rather than W - Q.

    Args:
        weight: ``(d_out, d_in)`` float32.
        gram: ``(d_in, d_in)``, the sum of x x^T over the inputs x.
        entry: a format with a grid.

    Returns:
        Raw rows, ``(d_out, bytes)`` uint8.
    """
    grid, width = entry.grid, entry.block or _COLUMNS
    assert grid is not None
    entry.row_bytes(weight.shape[1])
    whole = None if entry.block else _scales(weight, grid, _NARROWER[1:2])
    left, factor = weight.clone(), _inverse_factor(gram)
    found = []
    for start in range(0, weight.shape[1], width):
        span = slice(start, start + width)
        block = left[:, span].contiguous()
        made, errors = _rounded_block(block, factor[span, span], grid, whole or _scales(block, grid))
        left[:, span.stop :].addmm_(errors, factor[span, span.stop :], alpha=-1)
        found.append(made)
    if whole:
        return grid.pack(found[0][0], found[0][1], torch.cat([codes for _, _, codes in found], dim=1))
    scale, least, codes = (torch.stack(part, dim=1).flatten(0, 1) for part in zip(*found, strict=True))
    return grid.pack(scale, least, codes).view(len(weight), -1)


def _inverse_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Gram matrix's inverse: row j spreads column j's error over later ones."""
    damped = gram.double()
    damped = damped + _DAMPING * damped.diagonal().mean().clamp(min=1e-12) * torch.eye(
        len(gram), dtype=torch.float64
    )
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _rounded_block(
    block: Tensor, factor: Tensor, grid: Grid, scales: tuple[Tensor, Tensor]
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Round the columns of a block one after another with each of some scales, and keep for each row the best.

    Args:
        block: ``(rows, width)``.
        factor: ``(width, width)``, its part of the inverse factor.
        grid: of the format.
        scales: to try, and the least numbers, ``(scales, rows)`` each.

    Returns:
        Scale and least number ``(rows, 1)`` and codes ``(rows, width)`` uint8; and the errors ``(rows, width)``, each
        in units of what it costs.
    """
    scale, least = scales
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    left = block.t()[:, None].repeat(1, len(scale), 1)  # (width, scales, rows): a column lies in one piece
    errors, codes = torch.empty_like(left), torch.empty_like(left, dtype=torch.uint8)
    for place in range(len(left)):
        code = grid.nearest((left[place] - least) * inverse)
        codes[place] = code
        errors[place] = (left[place] - (scale * grid.level(code) + least)) / factor[place, place]
        left[place + 1 :].addcmul_(factor[place, place + 1 :, None, None], errors[place], value=-1)
    best = errors.square().sum(0).argmin(0, keepdim=True)
    wide = best.expand(len(left), 1, -1)
    chosen, lost = (each.gather(1, wide)[:, 0].t().contiguous() for each in (codes, errors))
    return (scale.gather(0, best).t(), least.gather(0, best).t(), chosen), lost


def _scales(block: Tensor, grid: Grid, narrower: Sequence[float] = _NARROWER) -> tuple[Tensor, Tensor]:
    """Scales to try, and the least number that goes with each, as the format keeps them: (scales, rows)."""
    scale, least = (each[:, 0] for each in grid.scales(block))
    share = 1 - torch.tensor(narrower)[:, None] / grid.most
    tried = (share * scale).to(grid.kept).float()
    if grid.levels is not None:
        return tried, torch.zeros_like(tried)
    if grid.centre is not None:
        return tried, -grid.centre * tried
    return tried, (least + (1 - share) / 2 * grid.most * scale).to(grid.kept).float()


# ------------------------------------------------------------------------------------------------- keeping some at Q8_0


def kept_wide(
    handle: Handle,
    merged: Mapping[str, MergedLayer],
    cost: Callable[[], float],
    budget: int,
    *,
    on_progress: OnProgress | None = None,
) -> dict[str, MergedLayer]:
    """Return a merge in which some layers are at Q8_0 instead: those that lose most for each byte more.

    Each layer is tried at Q8_0 while all others are as merged.

    Args:
        handle: the adapter that was merged.
        merged: what `plain_merge` or `careful_merge` gave.
        cost: measures what the merged model has lost, such as its KL from the adapted one on calibration rows.
        budget: bytes that the file may grow by.
        on_progress: told how many layers were tried.
    """
    wide = {
        path: MergedLayer("Q8_0", merged_rows(handle, path, "Q8_0"), each.bias)
        for path, each in merged.items()
    }
    more = {path: wide[path].rows.numel() - layer.rows.numel() for path, layer in merged.items()}
    gains: dict[str, float] = {}
    with answering_as(handle, merged) as use:
        before = cost()
        for path in merged:
            use({path: wide[path]})
            gains[path] = before - cost()
            use({path: merged[path]})
            if on_progress:
                on_progress(Progress("try layers at Q8_0", len(gains), len(merged), "layers"))
    chosen = dict(merged)
    for path in sorted(gains, key=lambda path: gains[path] / max(1, more[path]), reverse=True):
        if gains[path] > 0 and more[path] <= budget:
            chosen[path] = wide[path]
            budget -= more[path]
    return chosen


def widened(job: Job, kinds: Mapping[str, str], size: int) -> frozenset[str]:
    """Return the layers of a careful merge that are better kept at Q8_0, by what the model answers to calibration rows.

    Args:
        job: with calibration rows.
        kinds: the format of each layer that may be, one with a grid and blocks of 32.
        size: bytes of the file, which may grow by `GROWTH`.
    """
    if job.handle.through:
        return frozenset()  # its merge is exact as it is
    merged = {
        path: MergedLayer(kind, careful_rows(job, kind, path), _bias(job.handle, path))
        for path, kind in kinds.items()
    }
    wanted: list[Tensor] = []
    for row in job.calibration:
        if sum(map(len, wanted)) < _ASKED:
            wanted.append(answer(job.model, row, job.probes.kind))
    rows = job.calibration[: len(wanted)]

    def cost() -> float:
        return mean_kl((answer(job.model, row, job.probes.kind) for row in rows), wanted)

    chosen = kept_wide(job.handle, merged, cost, int(GROWTH * size), on_progress=job.on_progress)
    return frozenset(path for path, layer in chosen.items() if layer.format != kinds[path])


# ------------------------------------------------------------------------------------------------ answering as a merge

Use = Callable[[Mapping[str, MergedLayer]], None]


@contextlib.contextmanager
def answering_as(handle: Handle, merged: Mapping[str, MergedLayer]) -> Iterator[Use]:
    """Let the model compute with merged layers inside a ``with`` block, in place of layer and adapter.

    Args:
        handle: the adapter that was merged.
        merged: its layers by path.

    Yields:
        What puts other merged layers in the place of some.
    """
    views = {path: handle.view(path) for path in merged}
    stand_ins = {path: _StandIn(layer, views[path].d_in) for path, layer in merged.items()}
    standing = install_adapters(handle.model, handle.method, "merged-rows", dict(views), dict(stand_ins))

    def use(layers: Mapping[str, MergedLayer]) -> None:
        for path, layer in layers.items():
            stand_ins[path].put(layer)

    try:
        yield use
    finally:
        standing.detach()


class _StandIn(Adapter):
    """Computes with a merged layer, whatever else is on the layer."""

    def __init__(self, layer: MergedLayer, d_in: int) -> None:
        super().__init__()
        self.d_in = d_in
        self.put(layer)

    def put(self, layer: MergedLayer) -> None:
        self.weight, self.bias = layer.weight(self.d_in), layer.bias

    def forward(self, x: Tensor, base: Base) -> Tensor:
        bias = None if self.bias is None else self.bias.to(base.dtype)
        return bare_of(base).apply(x, self.weight.to(base.dtype), bias)


def mean_kl(logits: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Return the mean over positions of KL(wanted || logits), nats; rows of ``(T, vocabulary)`` each."""
    total, count = 0.0, 0
    for found, target in zip(logits, wanted, strict=True):
        ours, theirs = functional.log_softmax(found.float(), -1), functional.log_softmax(target.float(), -1)
        total += float((theirs.exp() * (theirs - ours)).sum())
        count += len(target)
    return total / count
