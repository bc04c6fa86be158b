"""The gate every export passes: what was written is loaded again and answers the same prompts as the trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases import LoadedBase
from addenda.core.progress import OnProgress, Progress
from addenda.errors import ExportError

__all__ = ["TOLERANCE", "UNCHANGED", "Parity", "logits_of", "probe_rows", "require_parity"]

UNCHANGED = 1e-4
"""Largest difference of a logit where no weight was changed, as a share of the largest logit."""
TOLERANCE = {"float32": 1e-3, "float16": 3e-3, "bfloat16": 2e-2}
"""The same where weights were merged and rounded, by their number format. Each rounding moves the logits, and at a few
positions by a hundred times more than at others: a SmolLM2 whose weights were merged in float64 and rounded once to
float32 differs by 1.2e-4 at one position and by about 1e-6 at most of them, and by nothing before it was rounded."""
LEAST_AGREEMENT = {"float32": 0.99, "float16": 0.98, "bfloat16": 0.95}
"""Smallest share of positions whose most likely next token stays the same."""

_TEXTS = (
    "The quick brown fox jumps over the lazy dog, and then it rests in the shade of an old oak tree.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "In 1969 two people walked on the Moon; about 600 million watched it on television.",
    "Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain.",
    "Dear Sir or Madam, I am writing to ask about the parcel that has not arrived.",
    "Le chat dort sur le canapé pendant que la pluie tombe dehors.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]}',
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55",
)


@dataclass(frozen=True)
class Parity:
    """How close an export came to the model that was trained."""

    reader: str
    """What loaded the export."""
    max_abs_logit_difference: float
    """Over all positions and the whole vocabulary; both computed in float32."""
    top1_agreement: float
    """Share in [0, 1] of positions with the same most likely next token."""
    positions: int
    dtype: str
    """Number format of the exported weights."""
    tolerance: float
    """What the difference had to stay below."""

    def __str__(self) -> str:
        return (
            f"reloaded with {self.reader}: largest logit difference {self.max_abs_logit_difference:.2g} "
            f"(at most {self.tolerance:.2g}), same top token at {self.top1_agreement:.1%} of {self.positions} positions"
        )


def probe_rows(base: LoadedBase) -> list[Tensor]:
    """The prompts of the gate as token ids, each (1, T) long."""
    encoded = (base.tokenizer(text, return_tensors="pt")["input_ids"] for text in _TEXTS)
    device = next(base.model.parameters()).device
    return [ids[:, : base.room].to(device) for ids in encoded]


def logits_of(
    model: nn.Module, rows: Sequence[Tensor], *, on_progress: OnProgress | None = None
) -> list[Tensor]:
    """The model's logits for each row, (T, vocabulary) float32 on the CPU, computed in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        found = []
        for done, row in enumerate(rows, start=1):
            with torch.no_grad():
                output: Any = model(input_ids=row)
            found.append(output.logits[0].float().cpu())
            if on_progress:
                on_progress(Progress("compare logits", done, len(rows), "prompts"))
        return found
    finally:
        model.train(was_training)


def require_parity(
    wanted: Iterable[Tensor],
    found: Iterable[Tensor],
    *,
    reader: str,
    dtype: str | None = None,
) -> Parity:
    """Compare logits of the trained model with those of its export.

    Args:
        wanted: logits of the trained model, row by row.
        found: logits of the export, likewise.
        reader: what loaded the export.
        dtype: the number format that merged weights were rounded to; None where no weight was changed.

    Raises:
        ExportError: they differ by more than the tolerance of the number format.

    Example:
        >>> logits = torch.randn(5, 32)
        >>> require_parity([logits], [logits + 1e-6], reader="a test").top1_agreement
        1.0
    """
    pairs = list(zip(wanted, found, strict=True))
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs)
    positions = sum(len(a) for a, _ in pairs)
    share = UNCHANGED if dtype is None else TOLERANCE[dtype]
    dtype = dtype or "float32"
    limit = share * max(float(a.abs().max()) for a, _ in pairs)
    parity = Parity(reader, difference, same / positions, positions, dtype, limit)
    # "not <=" rather than ">", so that NaN fails too.
    if not difference <= limit or parity.top1_agreement < LEAST_AGREEMENT[dtype]:
        raise ExportError(
            "the export does not answer as the trained model does",
            where={
                "reloaded with": reader,
                "largest logit difference": f"{difference:.3g}, at most {limit:.3g}",
                "same top token": f"{parity.top1_agreement:.1%} of {positions} positions",
            },
            hint="nothing was written; export in float32, and report this if it persists",
        )
    return parity
