from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

import addenda
from addenda.errors import ConfigError
from addenda.train import failpoints
from addenda.train.failpoints import FAILPOINTS, failpoint


@pytest.fixture(autouse=True)
def _counted_anew(monkeypatch):
    monkeypatch.setattr(failpoints, "_passed", {})


def test_nothing_happens_unless_asked_for(monkeypatch):
    monkeypatch.delenv("ADDENDA_FAILPOINTS", raising=False)
    assert [failpoint(name) for name in FAILPOINTS] == [None] * len(FAILPOINTS)


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("eio", errno.EIO)])
def test_the_nth_passage_fails_and_no_other(monkeypatch, action, number):
    monkeypatch.setenv("ADDENDA_FAILPOINTS", f"checkpoint.write={action}@3, evaluate=eio@9")
    failpoint("checkpoint.write")
    failpoint("checkpoint.fsync")
    failpoint("checkpoint.write")
    with pytest.raises(OSError, match=r"checkpoint\.write") as caught:
        failpoint("checkpoint.write")
    assert caught.value.errno == number
    failpoint("checkpoint.write")


@pytest.mark.parametrize("wish", ["checkpoint.wrote=kill", "evaluate=explode", "evaluate=kill@x", "nonsense"])
def test_a_wish_that_cannot_be_read_is_an_error(monkeypatch, wish):
    monkeypatch.setenv("ADDENDA_FAILPOINTS", wish)
    with pytest.raises(ConfigError, match="cannot read"):
        failpoint("evaluate")


def test_kill_ends_the_process_without_a_word():
    code = "from addenda.train.failpoints import failpoint; failpoint('evaluate'); print('alive')"
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={"ADDENDA_FAILPOINTS": "evaluate=kill"},
        capture_output=True,
        timeout=60,
    )
    assert (answer.returncode, answer.stdout) == (-9, b"")


def test_every_name_stands_in_the_source_once():
    room = Path(addenda.__file__).parent / "train"
    text = "".join(file.read_text() for file in room.glob("*.py"))
    for name in FAILPOINTS:
        assert text.count(f'failpoint("{name}")') == 1, name
