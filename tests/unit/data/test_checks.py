"""Every check fires on its bad example, is silent on its good one, and says what to do."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from transformers import PreTrainedTokenizerFast

from addenda.data import Encoder, Report, read_dataset
from addenda.data.checks import CHECKS, Check
from addenda.data.checks.base import register
from addenda.data.dataset import to_finding
from addenda.data.examine import Examiner, is_error, plain_messages
from addenda.data.raw import RawRow
from addenda.errors import ConfigError

Write = Callable[..., Path]


def report_of(check: type[Check], path: Path, tokenizer: PreTrainedTokenizerFast) -> Report:
    """Everything found in an example, by reading it and, where the check needs it, by encoding it too."""
    dataset = read_dataset(path)
    report = Report()
    for part in (dataset, dataset.valid):
        if part is not None:
            report.merge(part.report)
    if check.stage == "encode":
        encoder = Encoder(tokenizer, check.template, max_tokens=check.max_tokens)
        for conversation in dataset.conversations:
            for problem in encoder.encode(conversation)[1]:
                report.add(to_finding(problem, str(path)))
    return report


@pytest.mark.parametrize("code", CHECKS)
def test_a_check_fires_on_its_bad_example(
    code: str, write: Write, tokenizer: PreTrainedTokenizerFast
) -> None:
    check = CHECKS[code]
    report = report_of(check, write(check.bad, check.file_name), tokenizer)
    assert code in report.counts
    finding = next(finding for finding in report if finding.code == code)
    assert finding.found
    assert finding.fix
    assert report.has_errors or check.severity == "warning"


@pytest.mark.parametrize("code", CHECKS)
def test_a_check_is_silent_on_its_good_example(
    code: str,
    write: Write,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    templates: object,
) -> None:
    check = CHECKS[code]
    if check.stage == "encode" and code in ("template_not_prefix_stable", "no_end_token"):
        monkeypatch.setattr(check, "template", templates.source["chatml"])  # its bad example is the template
    report = report_of(check, write(check.good, check.file_name), tokenizer)
    assert code not in report.counts
    assert not report.has_errors


@pytest.mark.parametrize("code", CHECKS)
def test_a_check_explains_itself(code: str) -> None:
    check = CHECKS[code]
    page = inspect.cleandoc(check.__doc__ or "")
    for section in ("What it finds:", "Why it matters:", "Example:", "What to do:"):
        assert section in page
    assert check.summary().endswith(".")
    assert check.code == code == code.lower()
    assert check.fix[0].islower()
    assert not check.fix.endswith(".")


def test_finding_the_same_file_twice_finds_the_same(write: Write) -> None:
    path = write(
        b"".join(check.bad for check in CHECKS.values() if check.stage in ("bytes", "record", "turns"))
    )
    first, second = read_dataset(path).report, read_dataset(path).report
    assert first.to_json() == second.to_json()
    assert first.errors > 15


def test_a_taken_code_is_refused() -> None:
    with pytest.raises(ConfigError, match="'data_type' is registered twice"):
        register(type("Again", (Check,), {"code": "data_type"}))


def test_no_check_fires_on_a_row_that_the_short_path_lets_through() -> None:
    """The short path is a copy of what the checks say of plain rows; random mutants of good rows try to break it."""
    rng = random.Random(7)
    passed = 0
    for _ in range(4000):
        row = mutant(rng)
        if plain_messages(row) is None:
            continue
        passed += 1
        whole = Examiner()._examine_value(row, None, keep=False)  # type: ignore[arg-type]
        assert whole.problems == []
        short = Examiner().examine(RawRow(0, 1, 0, orjson.dumps(row)))
        assert (short.shape, short.digest) == (whole.shape, whole.digest)
    assert 200 < passed < 3800


def mutant(rng: random.Random) -> dict[str, object]:
    """A row that is sometimes right: roles, contents and keys are drawn, mostly from the right ones."""
    roles = (
        ["user", "assistant"] * 2 if rng.random() < 0.7 else rng.choices(["user", "assistant", "system"], k=3)
    )
    if rng.random() < 0.3:
        roles.insert(0, "system")
    values: list[object] = ["", "  ", None, 3, [], "\u00a0", ["a"]]
    messages = []
    for role in roles[: rng.randint(1, 5)]:
        content = rng.choice(values) if rng.random() < 0.08 else rng.choice(["Hi.", "é\n", "\\u0000"])
        messages.append({"role": role if rng.random() < 0.97 else "bot", "content": content})
        if rng.random() < 0.04:
            messages[-1]["weight"] = rng.choice([0, 1, 2])
        if rng.random() < 0.03:
            del messages[-1][rng.choice(["role", "content"])]
    if rng.random() < 0.3:
        prompt, completion = (
            rng.choice(["a", "b", *values]) if rng.random() < 0.4 else "x" for _ in range(2)
        )
        return {"prompt": prompt, "completion": completion}
    return {"messages": messages} | ({"text": "x"} if rng.random() < 0.05 else {})


def test_an_error_is_told_from_a_warning() -> None:
    first = CHECKS["duplicate_row"].problem("twice")
    second = CHECKS["duplicate_row"].problem("twice", severity="error")
    assert (is_error(first), is_error(second)) == (False, True)
