"""Questions are picked without looking at answers, and answered by the base and by the adapted model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import addenda
from addenda.bases.generate import generate
from addenda.bases.loaded import LoadedBase
from addenda.core.handle import Handle
from addenda.core.progress import Progress
from addenda.data.rows import Conversation, Message, RowRef
from addenda.errors import MethodError
from addenda.evals.samples import sample_pairs, varied


def conversation(
    *turns: tuple[str, str], index: int = 0, tools: tuple[dict[str, object], ...] = ()
) -> Conversation:
    return Conversation(tuple(Message(*turn) for turn in turns), RowRef("made-up", index + 1, index), tools)


def question(text: str, answer: str = "yes") -> Conversation:
    return conversation(("user", text), ("assistant", answer))


def moved(base: LoadedBase) -> Handle:
    handle = addenda.attach(base.model, addenda.LoRA(rank=8))
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=0.5)
    return handle


def test_before_is_the_bases_answer_and_after_the_adapted_models(tiny_base: LoadedBase) -> None:
    rows = [
        question("Do you ship to Norway?", "We do."),
        conversation(
            ("system", "Be kind."),
            ("user", "hi"),
            ("assistant", "hello"),
            ("user", "price?"),
            ("assistant", "12"),
        ),
    ]
    prompts = [[turn.as_dict() for turn in row.messages[:-1]] for row in rows]
    plain = generate(tiny_base, prompts, max_new_tokens=6)
    handle = moved(tiny_base)
    pairs = sample_pairs(tiny_base, handle, rows, max_new_tokens=6)
    assert [pair.before for pair in pairs] == plain
    assert [pair.after for pair in pairs] == generate(tiny_base, prompts, max_new_tokens=6)
    assert [pair.before for pair in pairs] != [pair.after for pair in pairs]
    assert [pair.reference for pair in pairs] == ["We do.", "12"]
    assert pairs[1].messages == (
        ("system", "Be kind."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "price?"),
    )
    assert handle.active


def test_picked_questions_differ_and_near_copies_come_last() -> None:
    rows = [question(text) for text in ("a b c d", "a b c e", "a b c f", "x y z", "m n o p q")]
    assert [row.messages[0].content for row in varied(rows, 3)] == ["a b c d", "x y z", "m n o p q"]
    assert varied(rows, 3) == varied(rows, 3)
    assert len(varied(rows, 50)) == 5
    assert varied([], 3) == []


def test_pick_does_not_depend_on_the_answers() -> None:
    texts = [" ".join(chr(97 + int(i)) for i in torch.randint(0, 26, (6,))) for _ in range(30)]
    one = varied([question(text, "short") for text in texts], 5)
    other = varied([question(text, text * 3) for text in texts], 5)
    assert [row.messages[0] for row in one] == [row.messages[0] for row in other]


def test_rows_without_a_question_to_answer_are_passed_over(tiny_base: LoadedBase) -> None:
    rows = [
        conversation(("user", "no answer")),
        conversation(("assistant", "no question")),
        conversation(("user", "call"), ("assistant", "tools"), tools=({"type": "function"},)),
        Conversation((), RowRef("made-up", 1, 0), text="plain text"),
        question("x" * 2000),
        question("the one"),
    ]
    pairs = sample_pairs(tiny_base, moved(tiny_base), rows, max_new_tokens=2)
    assert [pair.messages for pair in pairs] == [(("user", "the one"),)]


def test_base_without_a_template_is_asked_nothing(plain_base: LoadedBase) -> None:
    assert sample_pairs(plain_base, moved(plain_base), [question("hi")]) == []


def test_progress_covers_both_models(tiny_base: LoadedBase) -> None:
    seen: list[Progress] = []
    rows = [question(f"question {index}") for index in range(10)]
    sample_pairs(tiny_base, moved(tiny_base), rows, count=9, max_new_tokens=1, on_progress=seen.append)
    assert [(step.task, step.done) for step in seen] == [
        (task, done) for task in ("answers of the base", "answers of the adapted model") for done in (0, 8, 9)
    ]
    assert all(step.total == 9 for step in seen)


def test_disabled_adapter_is_refused(tiny_base: LoadedBase) -> None:
    handle = moved(tiny_base)
    handle.disable()
    with pytest.raises(MethodError, match="disabled, so nothing changes"):
        sample_pairs(tiny_base, handle, [question("hi")])
