"""Every event of a run has its line, and a run can be followed from them alone."""

from __future__ import annotations

import pytest

from addenda.cli.columns import side_by_side
from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.core.progress import Progress
from addenda.recipe import Note
from addenda.train import CheckpointEvent, EvalEvent, NoticeEvent, ResumeEvent, StartEvent, StepEvent

START = StartEvent(
    step=0,
    resumed=False,
    of_steps=12,
    epochs=3,
    rows=1600,
    heldout_rows=40,
    trainable_parameters=10,
    learning_rate=1e-3,
    tokens_per_micro_batch=1024,
    machine="2 CPU threads, compiled kernels",
    memory="at most 900 MiB",
    dtype="bfloat16",
    path="packed",
    path_reason="proven",
)
STEP = StepEvent(
    step=4,
    of_steps=12,
    epoch=1.0,
    loss=2.34567,
    lr=1e-3,
    grad_norm=1.0,
    tokens=900,
    trained_tokens=400,
    tokens_per_second=1234.5,
    seconds=3.0,
    eta_seconds=6.0,
)


@pytest.mark.parametrize(
    ("event", "parts"),
    [
        (Note("split: 40 of 400 rows are held out"), ["split: 40 of 400 rows are held out"]),
        (NoticeEvent(3, "a notice"), ["step 3: a notice"]),
        (START, ["1,600 rows, 3 epochs, 12 steps", "learning rate 0.001", "bfloat16", "packed: proven"]),
        (
            EvalEvent(4, 1.0, {"nll_per_token": 1.5}, best=True, seconds=0.1),
            ["step 4", "1.5000 nats per token", "best"],
        ),
        (
            ResumeEvent(4, "ck/4", ("ck/8: damaged",)),
            ["resumed at step 4 from ck/4", "passed over: ck/8: damaged"],
        ),
    ],
)
def test_events_are_told_on_standard_error(
    event: object, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with Display(Console()) as display:
        display(event)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [part for part in parts if part not in shown.err] == []
    with Display(Console(verbosity=-1)) as display:
        display(event)
    assert capsys.readouterr().err == ""


def test_checkpoints_are_details(capsys: pytest.CaptureFixture[str]) -> None:
    event = CheckpointEvent(4, "ck/4", 2 * 2**20, 0.25)
    for verbosity, expected in ((0, ""), (1, "step 4: saved ck/4 (2.0 MiB, 0.2 s)\n")):
        with Display(Console(verbosity=verbosity)) as display:
            display(event)
        assert capsys.readouterr().err == expected


def test_steps_become_one_bar_with_loss_and_speed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addenda.cli.progress.PATIENCE", 0.0)
    with Display(Console()) as display:
        display(STEP)
        display(Progress("other", 1, 2, "rows"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["train: 33% 4/12 steps  loss 2.346  1,234 tokens/s", "other: 50% 1/2 rows"]


def test_columns_wrap_to_the_width_and_show_empty_answers() -> None:
    text = side_by_side(("base", "one two three four five six"), ("adapted", ""), width=35)
    assert text.splitlines() == [
        "base             |  adapted",
        "one two three    |  (nothing)",
        "four five six    |",
    ]
