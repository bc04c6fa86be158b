"""The divergence from the base: exactly zero when nothing changed, and the textbook formula when something did."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import addenda
from addenda.bases.loaded import LoadedBase
from addenda.core.handle import Handle
from addenda.core.progress import Progress
from addenda.data.encode import encode
from addenda.data.rows import Conversation, Example, Message, RowRef
from addenda.errors import DataError, MethodError
from addenda.evals.general_kl import GeneralPrompt, general_kl, general_prompts, kl_divergence

METHODS = [addenda.LoRA(rank=4), addenda.IA3(), addenda.BitFit(), addenda.Bottleneck()]


def attached(base: LoadedBase, *, std: float, method: object = METHODS[0]) -> Handle:
    handle = addenda.attach(base.model, method)
    for parameter in handle.parameters():
        if std:
            nn.init.normal_(parameter, std=std)
    return handle


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_untouched_adapter_has_moved_exactly_nothing(
    tiny_base: LoadedBase, method: object, dtype: torch.dtype
) -> None:
    tiny_base.model.to(dtype)
    kl = general_kl(tiny_base, attached(tiny_base, std=0, method=method), prompts=general_prompts()[:12])
    assert (kl.mean, kl.low, kl.high, kl.answer_mean, kl.agreement) == (0.0, 0.0, 0.0, 0.0, 1.0)


def test_mean_equals_a_float64_reference_over_all_prompts(tiny_base: LoadedBase) -> None:
    handle, prompts = attached(tiny_base, std=0.05), general_prompts()[::6]
    found = general_kl(tiny_base, handle, prompts=prompts)
    sums, answer_sums, tokens, answer_tokens = [], 0.0, [], 0
    model = tiny_base.model.double()
    for index, prompt in enumerate(prompts):
        row = RowRef("", index, index)
        messages = (Message("user", prompt.prompt), Message("assistant", prompt.answer))
        example = encode(
            Conversation(messages, row), tiny_base.tokenizer, chat_template=tiny_base.chat_template
        )
        assert isinstance(example, Example)
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            q = torch.softmax(model(input_ids=ids).logits[0], -1)
            with handle.disabled():
                p = torch.softmax(model(input_ids=ids).logits[0], -1)
        # Behind the opening "<|user|>", which predicts the prompt's first byte; the last token predicts nothing.
        kl = (p * (p.log() - q.log())).sum(-1)[:-1]
        answer = torch.tensor(example.trained[1:])
        sums.append(float(kl.sum()))
        tokens.append(len(kl))
        answer_sums += float(kl[answer].sum())
        answer_tokens += int(answer.sum())
    model.float()
    assert found.tokens == sum(tokens)
    assert [shift.tokens for shift in found.prompts] == tokens
    assert found.mean == pytest.approx(sum(sums) / sum(tokens), rel=1e-4)
    assert [shift.kl_sum for shift in found.prompts] == pytest.approx(sums, rel=1e-4)
    assert found.answer_mean == pytest.approx(answer_sums / answer_tokens, rel=1e-4)
    assert found.low < found.mean < found.high
    assert 0 < found.agreement < 1


def test_opening_that_all_prompts_share_is_left_out(tiny_base: LoadedBase) -> None:
    handle = attached(tiny_base, std=0.05)
    prompts = [GeneralPrompt("a", f"{start}bc", "yes") for start in "xyz"]
    plain = general_kl(tiny_base, handle, prompts=prompts)
    tiny_base.tokenizer.chat_template = "<|system|>Be brief.<|end|>" + tiny_base.chat_template
    longer = dataclasses.replace(tiny_base, chat_template=tiny_base.tokenizer.chat_template)
    opened = general_kl(longer, handle, prompts=prompts)
    assert [shift.tokens for shift in plain.prompts] == [9, 9, 9]
    assert [shift.tokens for shift in opened.prompts] == [9, 9, 9]
    assert opened.mean != plain.mean
    assert general_kl(longer, handle, prompts=prompts[:1]).tokens > 9


def test_larger_change_moves_further(tiny_base: LoadedBase) -> None:
    handle, means = attached(tiny_base, std=0.03), []
    for factor in (1, 2, 2):
        for parameter in handle.parameters():
            parameter.data.mul_(factor**0.5)
        means.append(general_kl(tiny_base, handle, prompts=general_prompts()[:8]).mean)
    assert 0 < means[0] < means[1] < means[2]


def test_divergence_is_the_textbook_sum_and_never_nan_where_a_token_is_ruled_out() -> None:
    p_scores, q_scores = torch.randn(6, 50, dtype=torch.float64), torch.randn(6, 50, dtype=torch.float64)
    p, q = p_scores.softmax(-1), q_scores.softmax(-1)
    torch.testing.assert_close(kl_divergence(p_scores, q_scores), (p * (p / q).log()).sum(-1))
    p_scores[:, 7] = q_scores[:, 7] = -torch.inf
    found = kl_divergence(p_scores, q_scores)
    assert torch.isfinite(found).all()
    assert (found > 0).all()


def test_base_without_a_template_reads_the_prompts_as_plain_text(plain_base: LoadedBase) -> None:
    kl = general_kl(plain_base, attached(plain_base, std=0.05), prompts=general_prompts()[:4])
    texts = [f"{prompt.prompt}\n{prompt.answer}" for prompt in general_prompts()[:4]]
    # One token a byte and the end of text, predicted by the position before each but the first.
    assert [shift.tokens for shift in kl.prompts] == [len(text.encode()) for text in texts]
    assert kl.low is None


def test_adapter_is_enabled_again_and_the_modes_are_kept(tiny_base: LoadedBase) -> None:
    handle = attached(tiny_base, std=0.05)
    tiny_base.model.train()
    general_kl(tiny_base, handle, prompts=general_prompts()[:2])
    assert handle.active
    assert all(module.training for module in tiny_base.model.modules())


def test_disabled_or_merged_adapter_is_an_error_not_a_zero(tiny_base: LoadedBase) -> None:
    handle = attached(tiny_base, std=0.05)
    handle.disable()
    with pytest.raises(MethodError, match="'default' is disabled") as caught:
        general_kl(tiny_base, handle)
    assert "enable()" in caught.value.hint
    handle.enable()
    handle.merge()
    with pytest.raises(MethodError, match="is merged"):
        general_kl(tiny_base, handle)


def test_prompts_a_base_cannot_hold_are_counted_and_none_at_all_is_an_error(tiny_base: LoadedBase) -> None:
    handle = attached(tiny_base, std=0.05)
    prompts = [*general_prompts()[:3], GeneralPrompt("long", "x" * 2000, "y")]
    kl = general_kl(tiny_base, handle, prompts=prompts)
    assert (len(kl.prompts), kl.skipped) == (3, 1)
    cramped = dataclasses.replace(tiny_base, context_length=8)
    with pytest.raises(DataError, match="can hold none of the general prompts") as caught:
        general_kl(cramped, handle)
    assert "8" in str(caught.value.where["first"])
    assert "context length" in caught.value.hint


def test_progress_ends_at_the_number_of_prompts(tiny_base: LoadedBase) -> None:
    seen: list[Progress] = []
    general_kl(tiny_base, attached(tiny_base, std=0.05), on_progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (48, 48, "prompts")


def test_shipped_prompts_are_varied_and_short() -> None:
    prompts = general_prompts()
    assert len({prompt.prompt for prompt in prompts}) == 48
    assert len({prompt.topic for prompt in prompts}) == 8
    assert all(10 < len(prompt.prompt) + len(prompt.answer) < 400 for prompt in prompts)
