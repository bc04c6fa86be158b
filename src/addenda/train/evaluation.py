"""Held-out loss while training, the best adapter, and when to stop early."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from addenda.bases.packed import PackedModel
from addenda.core.handle import Handle
from addenda.data.pack import plan_batches
from addenda.data.rows import Example
from addenda.train.batches import packed_batch
from addenda.train.failpoints import failpoint
from addenda.train.guards import require_finite_metrics
from addenda.train.loss import packed_loss
from addenda.train.parallel import Parallel
from addenda.train.state import RunState

__all__ = ["Evaluate", "heldout_nll", "judge", "run_evaluation", "training_mode"]

Evaluate = Callable[[], Mapping[str, float]]
"""Measures the model as it is; returns at least ``nll_per_token`` on held-out rows, in nats."""


@contextlib.contextmanager
def training_mode(model: nn.Module, *handles: Handle) -> Iterator[None]:
    """Put the adapters in training mode and everything else in evaluation mode; undone at the end.

    The base does not learn, so its own dropout would only add noise; the adapter's dropout is the method's matter.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for handle in handles:
        for adapter in handle.adapters.values():
            adapter.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def run_evaluation(
    evaluate: Evaluate, handle: Handle, *, step: int, device: torch.device
) -> dict[str, float]:
    """Call ``evaluate`` with the adapter in evaluation mode, leaving gradients and random generators alone.

    Raises:
        TrainingError: what it returned is not finite.
    """
    failpoint("evaluate")
    for adapter in handle.adapters.values():
        adapter.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            metrics = {name: float(value) for name, value in evaluate().items()}
    finally:
        for adapter in handle.adapters.values():
            adapter.train()
    require_finite_metrics(metrics, step=step)
    return metrics


def heldout_nll(
    packed: PackedModel, examples: Sequence[Example], *, tokens: int, parallel: Parallel | None = None
) -> dict[str, float]:
    """Return the mean nll over all trained tokens of ``examples``, in nats per token; processes share the work."""
    device = next(packed.model.parameters()).device
    trained = sum(example.trained_tokens for example in examples)
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        groups = plan_batches([len(example) for example in examples], tokens_per_batch=tokens)
        parallel = parallel or Parallel()
        for index, weight in parallel.turns([sum(len(examples[row]) for row in group) for group in groups]):
            batch = packed_batch([examples[row] for row in groups[index]], device)
            hidden = packed.hidden(batch.input_ids, batch.lengths, prompts=batch.prompts)
            nll = packed_loss(packed, hidden, batch.predict_from, batch.targets, denominator=1.0)
            total += weight * nll.double().cpu()
    return {"nll_per_token": parallel.total(float(total))[0] / trained}


def judge(state: RunState, metrics: Mapping[str, float], *, epoch: float, patience: int | None) -> bool:
    """Enter an evaluation into the state, and return whether the adapter is the best trained one so far.

    The untrained model (step 0) is what others are compared with in reports, never the best: an adapter that does
    nothing would be no result.
    """
    nll = metrics["nll_per_token"]
    best = state.step > 0 and (state.best_nll is None or nll < state.best_nll)
    if best:
        state.best_step, state.best_nll, state.without_gain = state.step, nll, 0
    elif state.step > 0:
        state.without_gain += 1
        state.stopped_early = patience is not None and state.without_gain >= patience
    entry = {"step": state.step, "epoch": epoch, "metrics": dict(metrics), "best": best}
    state.evaluations.append(entry)
    return best
