"""The probe batch: proof that every adapter is called and receives a gradient.

Code that reads ``layer.weight`` instead of calling the layer passes an adapter by, and nothing in the loss shows it.
One forward and backward pass does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from addenda.core.handle import Handle, tokens_kept
from addenda.errors import TargetError

__all__ = ["Probe", "own_batch", "prove", "prove_by_own_batch"]

Probe = Callable[[nn.Module], Any] | Mapping[str, Any] | Tensor
"""A batch for one forward pass: keyword arguments, one tensor, or a function that runs the model itself."""


def own_batch(model: nn.Module) -> Probe | None:
    """Return the small batch that a model carries for itself (transformers' ``dummy_inputs``), if it has one."""
    if any(p.is_meta for p in model.parameters()):
        return None
    batch = getattr(model, "dummy_inputs", None)
    if not isinstance(batch, Mapping) or not all(isinstance(v, Tensor) for v in batch.values()):
        return None
    device, rows = next(model.parameters()).device, _rows_of_the_embedding(model)
    # The batch is made for any vocabulary; where this one is smaller, the tokens are taken modulo its size.
    fitted = {
        key: value % rows if rows and key.endswith("input_ids") else value for key, value in batch.items()
    }
    return {key: value.to(device) for key, value in fitted.items()}


def _rows_of_the_embedding(model: nn.Module) -> int | None:
    try:
        embedding = cast(Any, model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return getattr(embedding, "num_embeddings", None)


def prove_by_own_batch(handle: Handle, *, gradients: bool = True) -> None:
    """Prove by the batch that the model carries, if it carries one that its base can run.

    A vision model, for example, inherits a batch of tokens: the handle then says that the probe was not run.
    """
    batch = own_batch(handle.model)
    if batch is None:
        return
    try:
        prove(handle, batch, gradients=gradients)
    except TargetError:
        raise
    except Exception as problem:
        with handle.disabled(), _undisturbed(handle.model), torch.no_grad():
            try:
                _output(handle.model, batch)
            except Exception:  # noqa: BLE001  whatever a foreign model raises at a batch that is not for it
                handle.probed = f"not run: the model's own batch does not fit it ({type(problem).__name__})"
                return
        raise


def prove(handle: Handle, batch: Probe, *, gradients: bool = True) -> None:
    """Run one batch forward and backward, and check that each adapter was called and got a gradient.

    Without ``gradients``, it is enough to be called. The model is in evaluation mode meanwhile, so that nothing is
    dropped and no running statistic moves. Gradients, modes and the global random generator are as before afterwards.

    Raises:
        TargetError: an adapter was not called, or got no gradient; all of them are named.
    """
    counts = {path: host._addenda.calls for path in handle.paths if (host := handle._host(path))}
    for calls in counts.values():
        calls.pop(handle.name, None)
    parameters = dict(handle.named_parameters())
    with torch.enable_grad(), _undisturbed(handle.model), tokens_kept(handle.model, probing=True):
        loss = _scalar(_output(handle.model, batch))
        trained = [p for p in parameters.values() if p.requires_grad]
        found = (
            torch.autograd.grad(loss, trained, allow_unused=True)
            if loss.requires_grad and gradients
            else [None] * len(trained)
        )
    moved = {id(p) for p, g in zip(trained, found, strict=True) if g is not None and bool(g.abs().sum() != 0)}
    silent = [path for path, calls in counts.items() if not calls.get(handle.name)]
    unasked = _unasked(handle, silent)
    silent = [path for path in silent if path not in unasked]
    still = [
        path
        for path, a in handle.adapters.items()
        if not a.may_rest and not any(id(p) in moved for p in a.parameters())
    ]
    _report(
        handle, silent, [path for path in still if gradients and path not in silent and path not in unasked]
    )
    called = f"all {len(counts)}" if not unasked else f"{len(counts) - len(unasked)} of {len(counts)}"
    handle.probed = f"{called} adapters were called" + " and received a gradient" * gradients
    if unasked:
        handle.probed += f"; the router sent nothing to the {len(unasked)} others, such as '{min(unasked)}'"


def _unasked(handle: Handle, silent: list[str]) -> set[str]:
    """Return which of the silent adapters stand on experts that got no rows, while others beside them did."""
    owners: dict[str, object] = {}
    for path in handle.paths:
        view = handle._host(path)._addenda.view
        if view.routed:
            owners[path] = view.module.owner
    quiet = set(silent)
    asked = {owner for path, owner in owners.items() if path not in quiet}
    return {path for path in silent if path in owners and owners[path] in asked}


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode and keep the global random generator; both are restored."""
    # Recurrent layers stay as they are: cuDNN differentiates them in training mode only.
    modes = {module: module.training for module in model.modules() if not isinstance(module, nn.RNNBase)}
    with torch.random.fork_rng(devices=[]):
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _output(model: nn.Module, batch: Probe) -> Any:
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model)
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _scalar(output: Any) -> Tensor:
    """Reduce every floating tensor of an output to one number in which no element can cancel another for certain."""
    tensors = [t for t in _tensors(output) if t.is_floating_point()]
    if not tensors:
        raise TargetError(
            "the probe batch gave no floating-point output", hint="give a probe that returns tensors"
        )
    generator = torch.Generator().manual_seed(0)
    return sum(
        ((t.float() * torch.randn(t.shape, generator=generator).to(t.device)).sum() for t in tensors),
        torch.zeros(()),
    )


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, list | tuple):
        return [t for value in output for t in _tensors(value)]
    return []


def _report(handle: Handle, silent: list[str], still: list[str]) -> None:
    if not silent and not still:
        return
    problems = [f"the adapter on '{path}' was never called" for path in silent[:5]]
    problems += [f"the adapter on '{path}' received no gradient" for path in still[:5]]
    raise TargetError(
        "; ".join(problems),
        where={"never called": len(silent), "without gradient": len(still), "layers": len(handle.paths)},
        hint="something reads the layer's weight without calling the layer, or the batch does not reach it: "
        "leave it out of the targets, or give a probe batch that uses it",
    )
