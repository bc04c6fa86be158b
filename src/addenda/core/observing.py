"""Observe: run a model on some data and keep, of each layer, what its adapter is to begin with.

The layers are watched by adapters that add nothing, so every kind of layer and weight format is seen in one way, and
what runs fused otherwise runs plainly. The model is afterwards as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from addenda.core.attaching import install_adapters, require_free
from addenda.core.contract import Adapter, Base, Method
from addenda.core.layers import layer_at, view_of
from addenda.core.observations import Observed, Observer
from addenda.core.planning import plan
from addenda.core.probe import Probe, _output, _undisturbed
from addenda.core.progress import OnProgress, Progress
from addenda.core.targets import Targets
from addenda.core.views import LayerView
from addenda.errors import MethodError, TargetError

__all__ = ["Batch", "observe", "watch"]

Batch = Probe | tuple[Probe, Tensor]
"""A batch, or a batch and which of its positions count: ``(positions,)`` bool. Positions after those do not count."""

_NAME = "observing"


def observe(
    model: nn.Module,
    method: Method,
    targets: Targets | None = None,
    batches: Iterable[Batch] = (),
    *,
    original: nn.Module | None = None,
    on_progress: OnProgress | None = None,
) -> Observed:
    """Find out about the layers of a model what the adapters of a method have to begin with.

    The model is in evaluation mode meanwhile and afterwards as it was. Each layer keeps one sum, or a few vectors, of
    what it saw: a (d_in, d_in) or a (d_out, d_in) matrix at most.

    Args:
        model: the base, as for :func:`addenda.attach`.
        method: a method that needs to observe, such as ``LoRA(start="eva")``.
        targets: as for :func:`addenda.attach`.
        batches: of the data to train on, run one after another. Keyword arguments, a tensor, or a function of the
            model. With keyword arguments, positions that ``attention_mask`` masks or ``labels`` sets to -100 do not
            count; a pair gives them explicitly. A method that needs gradients needs the loss: labels among the keyword
            arguments of a transformers model, or a function that returns it.
        original: the model whose weights this one's were rounded from, where the method needs that instead of data.
        on_progress: told how many batches, or layers, are done.

    Returns:
        What was found, with the method to attach.

    Raises:
        MethodError: the method observes nothing, lacks what it needs, or saw too little.
        TargetError: a target matches nothing, or a layer was not reached.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> method = addenda.LoRA(rank=2, start="eva")
        >>> observed = addenda.observe(model, method, ["0"], batches=[torch.randn(20, 8)])
        >>> addenda.attach(model, observed.method, ["0"], observed=observed).trainable_parameters
        24
    """
    paths = [row.path for row in plan(model, method, targets).rows]
    _require_means(method, original)
    views = {path: view_of(layer_at(model, path), path) for path in paths}
    if original is None and (read := [path for path, view in views.items() if view.folded]):
        raise MethodError(
            f"'{read[0]}' is read by its module and never called: no input of it can be observed",
            where={"layers": len(read)},
            hint="leave these layers out of the targets, or begin with what the weight alone tells",
        )
    observers = {path: method.observer(view) for path, view in views.items()}
    if original is not None:
        _compare(views, observers, original, on_progress)
    else:
        watch(
            model,
            method,
            views,
            observers,
            gradients=method.needs() == "gradients",
            batches=batches,
            on_progress=on_progress,
        )
    layers = {path: observer.found() for path, observer in observers.items()}
    _require_finite(layers)
    return Observed(method.settled(layers), layers)


def _require_means(method: Method, original: nn.Module | None) -> None:
    needs = method.needs()
    if needs in (None, "weight"):
        raise MethodError(
            f"method '{method.name}' with these settings observes nothing", hint="attach it as it is"
        )
    if (needs == "original") != (original is not None):
        raise MethodError(
            f"method '{method.name}' with these settings observes {needs}",
            hint="give original=the model it was quantized from"
            if needs == "original"
            else "give batches instead",
        )


# ------------------------------------------------------------------------------------------------ inputs and gradients


class _Watcher(Adapter):
    """Adds nothing, and hands on the layer's inputs or the gradient of its weight."""

    def __init__(self, observer: Observer, base: Base, *, gradients: bool) -> None:
        super().__init__()
        self._see: Callable[[Tensor], None] = observer.see
        self.keep: Tensor | None = None
        """Which positions of the inputs count; None for all."""
        self.seen = False
        # A zero that takes a gradient lets one reach the output, though the base is frozen.
        self.zero = nn.Parameter(torch.zeros((), device=base.device)) if gradients else None

    def forward(self, x: Tensor, base: Base) -> Tensor:
        y = base(x)
        if self.zero is None:
            rows = base.inputs_last(x.detach())
            self._hand_on(_counting(rows.reshape(-1, rows.shape[-1]), self.keep))
        elif torch.is_grad_enabled():
            y = y + self.zero.to(y.dtype)
            # What follows may write over its input; its own autograd would not keep x, for the weight is frozen.
            y.register_hook(partial(self._differentiate, x.detach().clone(), base))  # type: ignore[no-untyped-call]
        return y

    def _differentiate(self, x: Tensor, base: Base, gradient: Tensor) -> None:
        with torch.enable_grad():
            weight = base.weight().requires_grad_()
            (found,) = torch.autograd.grad(base.apply(x, weight), weight, gradient)
        self._hand_on(found)

    def _hand_on(self, found: Tensor) -> None:
        self.seen = True
        self._see(found.detach().to(torch.promote_types(found.dtype, torch.float32)))


def _counting(rows: Tensor, keep: Tensor | None) -> Tensor:
    """The rows that count. Where there are fewer rows than positions, an expert saw some only: then all count."""
    if keep is None or len(keep) > len(rows):
        return rows
    return rows[: len(keep)][keep.to(rows.device)]


def watch(
    model: nn.Module,
    method: Method,
    views: Mapping[str, LayerView],
    observers: Mapping[str, Observer],
    *,
    gradients: bool = False,
    batches: Iterable[Batch],
    on_progress: OnProgress | None = None,
) -> None:
    """Run batches, and let an observer see the inputs of each layer, or the gradients of its weight.

    Args:
        model: the adapters on it that are active run.
        method: whose layers they are.
        views: the layers by path.
        observers: one for each.
        gradients: whether it is gradients that they are to see.
        batches: as for `observe`.
        on_progress: told how many batches are done.

    Raises:
        TargetError: a layer was not reached.
    """
    require_free(model, _NAME, {path: view.module for path, view in views.items()})
    watchers = {path: _Watcher(observers[path], view, gradients=gradients) for path, view in views.items()}
    handle = install_adapters(model, method, _NAME, dict(views), dict(watchers))
    total = len(batches) if isinstance(batches, Sized) else None
    try:
        with _undisturbed(model), _frozen(model, but=watchers.values()):
            for done, (batch, keep) in enumerate(map(_parts, batches), start=1):
                for watcher in watchers.values():
                    watcher.keep = keep
                with torch.set_grad_enabled(gradients):
                    output = _output(model, batch)
                    if gradients:
                        _loss(output).backward()  # type: ignore[no-untyped-call]
                if on_progress is not None:
                    on_progress(Progress("observe", done, total, "batches"))
    finally:
        handle.detach()
    silent = [path for path, watcher in watchers.items() if not watcher.seen]
    if silent:
        raise TargetError(
            f"nothing was observed of '{silent[0]}'",
            where={"layers": len(silent), "of": len(watchers)},
            hint="give batches that reach every target, or leave these layers out of the targets",
        )


@contextlib.contextmanager
def _frozen(model: nn.Module, *, but: Iterable[nn.Module]) -> Iterator[None]:
    """Keep gradients away from what else may train: other adapters on the model."""
    kept = {parameter for module in but for parameter in module.parameters()}
    thawed = [p for p in model.parameters() if p.requires_grad and p not in kept]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


def _parts(batch: Batch) -> tuple[Probe, Tensor | None]:
    """The batch, and which positions count."""
    if isinstance(batch, tuple):
        return batch
    masks = list(_masks(batch)) if isinstance(batch, Mapping) else []
    return batch, torch.stack(masks).all(0).flatten() if masks else None


def _masks(batch: Mapping[str, Any]) -> Iterator[Tensor]:
    if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.dim() == 2:
        yield mask.bool()
    if isinstance(labels := batch.get("labels"), Tensor) and labels.dim() == 2:
        yield labels != -100


def _loss(output: Any) -> Tensor:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise MethodError(
            "a batch gave no loss to differentiate",
            hint="put 'labels' into the batch, or give a function of the model that returns the loss",
        )
    return loss.reshape(())


# ------------------------------------------------------------------------------------------------------- the original


def _compare(
    views: Mapping[str, LayerView],
    observers: Mapping[str, Observer],
    original: nn.Module,
    on_progress: OnProgress | None,
) -> None:
    differs = False
    for done, (path, view) in enumerate(views.items(), start=1):
        try:
            first = view_of(layer_at(original, path), path).weight()
        except TargetError:
            raise TargetError(
                f"the original has no layer '{path}'", hint="give the model that this one was quantized from"
            ) from None
        own = view.weight()
        if first.shape != own.shape:
            raise TargetError(
                f"'{path}' has a weight of {tuple(own.shape)}, in the original of {tuple(first.shape)}",
                hint="give the model that this one was quantized from",
            )
        wide = torch.promote_types(torch.promote_types(first.dtype, own.dtype), torch.float32)
        error = first.to(device=own.device, dtype=wide) - own.to(wide)
        differs = differs or bool(error.any())
        observers[path].see(error)
        if on_progress is not None:
            on_progress(Progress("compare with the original", done, len(views), "layers"))
    if not differs:
        raise MethodError(
            "no layer differs from its original: there is no error to make up for",
            hint="observe a quantized model, or choose another start",
        )


def _require_finite(layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    for path, found in layers.items():
        if not all(bool(torch.isfinite(value).all()) for value in found.values()):
            raise MethodError(
                f"what was observed of '{path}' is not finite",
                hint="the model or the data overflows: observe in float32, or look at the data",
            )
