"""Run a causal language model over a packed row: samples end to end, no padding, no attention across samples.

`PackedModel` uses the model's own forward. Within a call three things differ: attention is per sample, position ids
restart with each sample, and known parts run in a leaner form (`addenda.bases.fast`). That this gives what the model
gives sample by sample is proven on a probe when the object is made. A model for which it does not hold is run one
sample at a time, which is slower and always right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from addenda.bases.fast.attention import packed_attention_on
from addenda.bases.fast.find import Found, find_fusions
from addenda.bases.fast.fusion import forward_replaced, fused_on
from addenda.bases.fast.padding import fill_of
from addenda.bases.fast.recompute import find_blocks, learning_blocks, recomputed
from addenda.bases.fast.segments import Segments
from addenda.bases.loaded import vocabulary_of
from addenda.core.handle import tokens_kept
from addenda.core.host import host_of, running_on
from addenda.errors import BaseModelError

__all__ = ["PackedModel", "evaluating"]

CROSSED_WINDOW = 1024
"""Sliding windows up to this many tokens are crossed by the probe; of wider ones only the argument is checked."""

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2}
"""Norm of the difference on the probe as a share of the states' own; 0.05 for others (norms run in fp32 in all)."""


class PackedModel:
    """A causal language model that reads packed rows.

    Args:
        model: a transformers model with an output head. It is used as it is: adapters attached now or later take
            part, train or eval mode is the caller's, and nothing of it differs outside a call. Without a decoder
            that can be run apart from its head, `hidden` gives the model's logits and `logits` hands them on.

    Raises:
        BaseModelError: calling the model with token ids alone fails.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> packed = PackedModel(LlamaForCausalLM(config))
        >>> hidden = packed.hidden(torch.tensor([5, 6, 7, 5, 6]), lengths=[3, 2])
        >>> packed.path, tuple(hidden.shape), tuple(packed.logits(hidden[:2]).shape)
        ('packed', (5, 16), (2, 32))
    """

    path: str
    """``packed``: whole rows at once. ``general``: one sample at a time."""
    reason: str
    """Why this path was taken."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        with evaluating(model):
            self._decoder, self._output_class, problem = _headless(model)
            found = find_fusions(self._decoder) if self._decoder else Found()
            self._fusions = found.fusions
            self._blocks = find_blocks(self._decoder) if self._decoder else ()
            problem = problem or _probe_packing(self)
        self.path = "general" if problem else "packed"
        self._found = Found() if problem else found
        self.reason = problem or "packed rows give what single samples give, proven on a probe"

    @property
    def fused(self) -> tuple[tuple[str, int], ...]:
        """Kinds of parts that run in a leaner form on the packed path, and how many of each."""
        return self._found.fused

    @property
    def unfused(self) -> tuple[tuple[str, str, int], ...]:
        """Kinds of parts that run as they are though they look like known ones, why, and how many of each."""
        return self._found.unfused

    @property
    def parts(self) -> str:
        """Which parts run fused, and why others that look alike do not, in words."""
        return "no part runs fused on the general path" if self.path == "general" else self._found.parts

    @property
    def blocks(self) -> int:
        """Number of repeated blocks that can keep their input alone; 0 on the general path.

        Blocks below everything that is trained keep nothing, and do not count.
        """
        return len(self._learning()) if self.path == "packed" else 0

    def hidden(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        *,
        prompts: Sequence[int] | None = None,
        recompute: int = 0,
    ) -> Tensor:
        """Return the states before the output head, for every token.

        Args:
            input_ids: ``(T,)`` long, the samples end to end.
            lengths: tokens of each sample; positive, adding up to T.
            prompts: how many of them are its prompt, for adapters that act on positions of it; None means all.
            recompute: how many of the first `blocks` keep their input alone and run again in the backward; it
                changes the memory and the time, not the result.

        Returns:
            ``(T, d)``.

        Raises:
            BaseModelError: the lengths do not fit the row.
        """
        if input_ids.ndim != 1 or sum(lengths) != len(input_ids) or min(lengths, default=0) < 1:
            raise BaseModelError(
                "the sample lengths do not fit the packed row",
                where={"row": tuple(input_ids.shape), "lengths": tuple(lengths)},
                hint="lengths are positive and add up to the number of tokens",
            )
        counts = tuple(lengths) if prompts is None else tuple(prompts)
        if self.path == "general":
            samples = zip(torch.split(input_ids, list(lengths)), counts, strict=True)
            return torch.cat([self.hidden_alone(sample, prompt) for sample, prompt in samples])
        return self.hidden_packed(input_ids, Segments(tuple(lengths), counts), recompute=recompute)

    def hidden_alone(self, input_ids: Tensor, prompt: int | None = None) -> Tensor:
        """Return the states ``(n, d)`` of one sample ``(n,)`` by the model's own forward.

        An adapter that acts on positions of the prompt is told how long it is, where the model hands that on.
        """
        told = (
            {}
            if prompt is None or prompt == len(input_ids) or not _acts_on_prompts(self.model)
            else {"prompt_lengths": torch.tensor([prompt], device=input_ids.device)}
        )
        if self._decoder is None:
            return _logits_of(self.model, input_ids, **told)
        return _states_of(self._decoder, input_ids, **told)

    def hidden_packed(self, input_ids: Tensor, segments: Segments, *, recompute: int = 0) -> Tensor:
        """Return the states ``(T, d)`` of a packed row in one forward, whatever the probe said."""
        assert self._decoder is not None
        tokens = len(input_ids)
        fill = fill_of(tokens, input_ids.device)
        row = torch.cat([input_ids, input_ids[:1].expand(fill)])
        positions = torch.cat([torch.arange(n, device=row.device) for n in (*segments.lengths, fill)])
        with self._lean(), recomputed(self._learning()[:recompute], self._lean):
            states = _states_of(self._decoder, row, position_ids=positions[None], segments=segments)
        return states[:tokens]

    def _learning(self) -> tuple[nn.Module, ...]:
        assert self._decoder is not None
        return learning_blocks(self._decoder, self._blocks)

    @contextmanager
    def _lean(self) -> Iterator[None]:
        with packed_attention_on(self.model), fused_on(self._fusions):
            yield

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores over the vocabulary ``(n, vocab)`` of states ``(n, d)``, as the model computes them."""
        if self._decoder is None:
            return hidden
        return _head_of(self.model, self._decoder, self._output_class(last_hidden_state=hidden[None]))


def _states_of(decoder: nn.Module, input_ids: Tensor, **arguments: Any) -> Tensor:
    states: Tensor = decoder(input_ids=input_ids[None], use_cache=False, **arguments)[0]
    return states.squeeze(0)


def _acts_on_prompts(model: nn.Module) -> bool:
    hosts = (host for module in model.modules() if (host := host_of(module)) is not None)
    return any(running_on(host) and host._addenda.view.kind == "transformer-block" for host in hosts)


def _logits_of(model: nn.Module, input_ids: Tensor, **arguments: Any) -> Tensor:
    own = {"use_cache": False} if hasattr(model, "config") else {}
    out = model(input_ids=input_ids[None], **own, **arguments)
    logits: Tensor = out if isinstance(out, Tensor) else out.logits
    return logits.squeeze(0)


def _head_of(model: nn.Module, decoder: nn.Module, decoded: Any) -> Tensor:
    """All that `model` does behind its decoder (head, scaling, soft cap), given the decoder's output."""
    states = decoded[0]
    with forward_replaced(decoder, lambda *_, **__: decoded), tokens_kept(model):
        return _logits_of(model, torch.zeros(states.shape[1], dtype=torch.long, device=states.device))


# ---------------------------------------------------------------------------------------------------------- the probe

_REFUSALS = (
    BaseModelError,
    TypeError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
)
"""What a model may raise when run in a way it was not made for; its message becomes the reason."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _headless(model: Any) -> tuple[nn.Module | None, type[Any], str]:
    """Find the part of the model below its output head, and the class of what it returns, proven on a probe.

    Returns:
        The decoder, its output's class, and ""; or None, None's class, and the reason.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if decoder is None or decoder is model:
        return None, type(None), "the model has no decoder apart from its output head"
    (sample,) = _probe_samples(model, [9])
    expected = _logits_of(model, sample)
    try:
        output = decoder(input_ids=sample[None], use_cache=False)
        logits = _head_of(model, decoder, type(output)(last_hidden_state=output[0]))
    except _REFUSALS as error:
        return None, type(None), f"the output head does not run apart from the decoder: {_first_line(error)}"
    if logits.shape != expected.shape or not _alike(logits, expected):
        return None, type(None), "decoder and output head run apart give other logits than the whole model"
    return decoder, type(output), ""


def _probe_packing(packed: PackedModel) -> str:
    """Return why packed rows do not give what single samples give, or "" where they do."""
    config, window = _text_config(packed.model), 0
    if getattr(config, "attention_chunk_size", None) is not None:
        return "the model attends in fixed chunks"
    if isinstance(getattr(config, "sliding_window", None), int):
        window = config.sliding_window
    samples = _probe_samples(packed.model, [7, 1, 5 + (window if window <= CROSSED_WINDOW else 0), 4])
    alone = [packed.hidden_alone(sample) for sample in samples]
    segments = Segments(tuple(len(sample) for sample in samples))
    try:
        together = torch.split(packed.hidden_packed(torch.cat(samples), segments), list(segments.lengths))
        samples[0] = samples[0].flip(0)
        again = torch.split(packed.hidden_packed(torch.cat(samples), segments), list(segments.lengths))
    except _REFUSALS as error:
        return f"the model does not run on packed rows: {_first_line(error)}"
    if not all(_alike(x, y) for x, y in zip(together, alone, strict=True)):
        return "a packed row gives other states than its samples one by one"
    if not all(_alike(x, y) for x, y in zip(again[1:], together[1:], strict=True)):
        return "samples of a packed row see each other"
    if window > CROSSED_WINDOW and segments.windows <= {None}:
        return f"its sliding window of {window} tokens is not handed to the attention function"
    return ""


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _probe_samples(model: Any, lengths: list[int]) -> list[Tensor]:
    """Random token ids, the same on every call; never the padding id, about which transformers would warn."""
    rows, device = vocabulary_of(model), next(model.parameters()).device
    ids = torch.randint(0, rows, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    padding = getattr(_text_config(model), "pad_token_id", None)
    ids[ids == padding] = (padding or 0) + 1 if (padding or 0) + 1 < rows else 0
    return list(torch.split(ids.to(device), lengths))


def _alike(x: Tensor, y: Tensor) -> bool:
    tolerance = TOLERANCE.get(x.dtype, 0.05)
    return bool((x - y).float().norm() <= tolerance * y.float().norm())


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
