"""Train any model in leaner forms within a ``with`` block, in a loop of one's own.

`PackedModel` is for causal models and this package's own loop. `lean` is for the rest: encoders of text and images,
batches with or without padding, any call that the model takes.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import nn

from addenda.bases.fast.find import IN_BATCHES, WITHOUT_PADDING, find_fusions
from addenda.bases.fast.fusion import fused_on
from addenda.bases.packed import evaluating
from addenda.core.host import require_module

__all__ = ["Lean", "lean"]


class Lean:
    """The leaner forms that a model's parts have; on within a ``with`` block, as often as one is entered."""

    fused: tuple[tuple[str, int], ...]
    """Kinds of parts that run in a leaner form within the block, and how many of each."""
    unfused: tuple[tuple[str, str, int], ...]
    """Kinds of parts that run as they are though they look like known ones, why, and how many of each."""

    def __init__(self, model: nn.Module, *, skip_padding: bool) -> None:
        require_module(model)
        with evaluating(model):
            self._found = find_fusions(model, (*IN_BATCHES, *(WITHOUT_PADDING if skip_padding else ())))
        self.fused, self.unfused = self._found.fused, self._found.unfused
        self._entered: list[ExitStack] = []

    def describe(self) -> str:
        """Return which parts run fused, and why others that look alike do not, in words."""
        return self._found.parts

    def __enter__(self) -> Lean:
        stack = ExitStack()
        stack.enter_context(fused_on(self._found.fusions))
        self._entered.append(stack)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.pop().close()


def lean(model: nn.Module, *, skip_padding: bool = False) -> Lean:
    """Find the parts of a model that have a leaner form, and let them take it in a ``with`` block.

    The block goes around forward and backward. Within it the model is called as ever, and gives what it gives outside,
    within rounding; dropout draws the same numbers. What changes is how much is kept and passed over:

    - Layers that read one tensor (queries, keys and values) are one node: one product with all their A, one gradient.
    - Outputs of norms and activations are made again in the backward, not kept for the adapted layers that read them.
    - RMS norms, gated MLPs and activations run in kernels where ``addenda.kernels.enable()`` was called and could
      compile them, else in plain PyTorch.

    Attention stays the model's own, and so do its masks, its dropout and, where it is asked for them, its weights; but
    where padding is left out each sample attends by itself, as in training on packed rows.
    A layer runs as it is where it is watched by a hook of somebody else's, under autocast, and when it is compiled.

    Args:
        model: any module; adapters may be attached before, or within the block.
        skip_padding: do no work for tokens that the attention mask hides, in encoders of text that are known to give
            the others the same without them. Their states come out as zeros: a loss must not read them. Dropout then
            draws other numbers, as there are fewer tokens. Calls that ask for the states or the attention weights of
            each block or meet a hook on one, and training with gradient checkpointing, take the padding along.

    Returns:
        What was found: ``fused``, ``unfused`` and ``describe()`` say it. It acts only within the block, which may be
        entered again and again. With gradient checkpointing the backward belongs inside the block, as it runs parts
        of the forward again. Second derivatives are refused with an error.

    Raises:
        TargetError: the model is no module.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
        >>> model = BertModel(config)
        >>> form = lean(model)
        >>> with form:
        ...     states = model(torch.tensor([[7, 8, 9]])).last_hidden_state
        >>> form.fused
        (('activation', 2), ('layer norm', 5), ('projections of one input', 2))
    """
    return Lean(model, skip_padding=skip_padding)
