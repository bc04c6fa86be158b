"""What ends a run before harm is done: numbers that are not finite, adapters that do not learn, divergence."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from addenda.core.handle import Handle
from addenda.data.rows import RowRef
from addenda.errors import TrainingError
from addenda.train.state import RECENT_LOSSES, RunState, adapter_tensors, digest_of_tensors

__all__ = [
    "require_finite_adapter",
    "require_finite_gradients",
    "require_finite_loss",
    "require_finite_metrics",
    "require_moved",
    "require_no_divergence",
    "require_reached",
    "require_trainable",
]

_SHOWN = 8


def require_trainable(handle: Handle) -> None:
    """Check that the adapter runs and that its parameters can change.

    Raises:
        TrainingError: it is merged, disabled or frozen.
    """
    if handle.merged or not handle.active:
        state = "merged" if handle.merged else "disabled"
        raise TrainingError(f"adapter '{handle.name}' is {state}", hint="call unmerge() or enable() first")
    if not any(p.requires_grad for p in handle.parameters()):
        raise TrainingError(
            f"no parameter of adapter '{handle.name}' is trainable",
            hint="load it with addenda.load(..., trainable=True)",
        )


def require_finite_loss(loss: Tensor, *, step: int, rows: Sequence[RowRef], losses: Sequence[float]) -> None:
    """Check the loss of one micro-batch before its backward pass.

    Args:
        loss: the loss, a scalar.
        step: the optimiser step under way.
        rows: the rows of the micro-batch.
        losses: losses of the steps before.

    Raises:
        TrainingError: it is not finite; names the rows.
    """
    if bool(loss.isfinite()):
        return
    before = ", ".join(f"{value:.4g}" for value in losses) or "none"
    raise TrainingError(
        f"the loss is {float(loss.detach())} in step {step}; nothing was updated",
        where={"tensor": "loss", "rows": _listed(rows), "losses before": before},
        hint="look at these rows, lower train.learning_rate, or use a base in float32",
    )


def require_finite_gradients(handle: Handle, norm: Tensor, *, step: int, rows: Sequence[RowRef]) -> None:
    """Check the gradients of a step before the update, given their common norm.

    Raises:
        TrainingError: the norm is not finite; names the tensors and the rows.
    """
    if bool(norm.isfinite()):
        return
    bad = [
        name
        for name, p in handle.named_parameters()
        if p.grad is not None and not bool(p.grad.isfinite().all())
    ]
    raise TrainingError(
        f"a gradient is not finite in step {step}; nothing was updated",
        where={"tensor": _listed(bad) or "norm of all gradients", "rows": _listed(rows)},
        hint="look at these rows, lower train.learning_rate, or use a base in float32",
    )


def require_finite_adapter(handle: Handle, *, step: int, rows: Sequence[RowRef]) -> None:
    """Check the adapter after an update, so that a bad one is never saved.

    Raises:
        TrainingError: a parameter is not finite; names the tensors and the rows.
    """
    norm = nn.utils.get_total_norm([p.detach() for p in handle.parameters()])
    if bool(norm.isfinite()):
        return
    bad = [name for name, p in handle.named_parameters() if not bool(p.isfinite().all())]
    if bad:
        raise TrainingError(
            f"the adapter is no longer finite after step {step}; it was not saved",
            where={"tensor": _listed(bad), "rows": _listed(rows)},
            hint="resume from the last checkpoint with a lower train.learning_rate in a new run folder",
        )


def require_finite_metrics(metrics: Mapping[str, float], *, step: int) -> None:
    """Check what an evaluation returned.

    Raises:
        TrainingError: ``nll_per_token`` is missing or a value is not finite.
    """
    if "nll_per_token" not in metrics:
        raise TrainingError(
            "the evaluation returned no 'nll_per_token'",
            where={"returned": " ".join(metrics)},
            hint="the evaluate function must return a mapping with 'nll_per_token'",
        )
    bad = [name for name, value in metrics.items() if not torch.tensor(float(value)).isfinite()]
    if bad:
        raise TrainingError(
            f"the evaluation after step {step} is not finite",
            where={name: metrics[name] for name in bad},
            hint="lower train.learning_rate, or use a base in float32",
        )


def require_reached(handle: Handle, *, step: int) -> None:
    """Check that every adapter received a gradient that is not zero.

    Raises:
        TrainingError: some did not; names their layers.
    """
    silent = [
        path for path, adapter in handle.adapters.items() if not adapter.may_rest and not _reached(adapter)
    ]
    if silent:
        raise TrainingError(
            f"{len(silent)} of {len(handle.adapters)} adapters received no gradient in step {step}",
            where={"layers": _listed(silent)},
            hint="the model does not use these layers on this data: leave them out of method.targets",
        )


def _reached(adapter: nn.Module) -> bool:
    return any(p.grad is not None and bool(p.grad.count_nonzero()) for p in adapter.parameters())


def require_no_divergence(state: RunState, *, learning_rate: float) -> None:
    """Check that the last losses are not far above what the untrained model gave.

    Divergence is a median of the last five losses above twice the reference plus 2 nats, where the reference is the
    larger of the first evaluation and the first loss: no data makes a working model that bad.

    Raises:
        TrainingError: the run diverges.
    """
    if len(state.recent_losses) < RECENT_LOSSES:
        return
    reference = max([state.first_loss, *(e["metrics"]["nll_per_token"] for e in state.evaluations[:1])])
    median = statistics.median(state.recent_losses)
    if median > 2.0 * reference + 2.0:
        raise TrainingError(
            f"training diverges: the loss is {median:.3g} nats per token in step {state.step}, {reference:.3g} before",
            where={"learning rate": f"{learning_rate:.3g}"},
            hint=f"set train.learning_rate={learning_rate / 10:.1g}",
        )


def require_moved(handle: Handle, initial_sha256: str) -> None:
    """Check that training changed the adapter.

    Raises:
        TrainingError: every weight is as it was before the first step.
    """
    if digest_of_tensors(adapter_tensors(handle)) == initial_sha256:
        raise TrainingError(
            "no weight of the adapter moved in the whole run",
            where={"adapter": handle.name, "layers": len(handle.adapters)},
            hint="the learning rate is too small for float32, or every gradient is zero",
        )


def _listed(things: Sequence[object]) -> str:
    more = f" and {len(things) - _SHOWN} more" if len(things) > _SHOWN else ""
    return ", ".join(str(thing) for thing in things[:_SHOWN]) + more
