"""The report of a run tells of the exports of its adapter, those that were refused among them."""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from addenda.cli.app import run
from addenda.errors import ExportError
from addenda.evals.record import ExportFacts, RunRecord
from addenda.evals.report import render_report
from addenda.export.parity import Closeness, Parity
from addenda.export.run import Gated
from addenda.intervals import Interval
from addenda.recipe import exports
from addenda.recipe.exports import reported_exports

SHORT = ("--set", "train.max_steps=3", "--set", "evals.samples=0", "--set", "base.dtype=float32")


@pytest.fixture(scope="module")
def made(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "made"
    assert run(["train", str(chat_rows), "--base", str(tiny_model), "--out", str(folder), "-q", *SHORT]) == 0
    return folder


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Path:
    """A finished run, of which each test has its own copy."""
    return Path(shutil.copytree(made, tmp_path / "trained"))


def shown(folder: Path) -> dict[str, ExportFacts]:
    """The exports of a record, by format and type, once the report is seen to be made from it."""
    record = RunRecord.from_json((folder / "record.json").read_text())
    assert render_report(record) == (folder / "report.html").read_text()
    return {f"{each.format} {each.type}".strip(): each for each in record.exports}


def gated(form: str, kind: str | None, verdict: str = "passed") -> Gated:
    found = Closeness(
        "a program 1.0", 9, math.inf, 1e-3, Interval(0.1, 0.0, 0.2, 9), 0.5, Interval(1, 1, 1, 9), None
    )
    return Gated(form, kind, 1234, Parity(verdict, f"it has {verdict}", 0.3, found, found))  # type: ignore[arg-type]


@pytest.mark.parametrize("inside", [True, False], ids=["adapter", "run"])
def test_each_format_and_type_is_shown_once_with_the_latest_finding(
    trained: Path, tmp_path: Path, inside: bool
) -> None:
    before = RunRecord.from_json((trained / "record.json").read_text())
    given = str(trained / "adapter" if inside else trained)
    forms = [("peft", ""), ("merged", "float32"), ("merged", "bfloat16"), ("merged", "float32")]
    for number, (form, kind) in enumerate(forms):
        out, more = tmp_path / f"out{number}", ["--type", kind] if kind else []
        # What was trained in three steps may be too little to tell a fault by; it is told of all the same.
        assert run(["export", given, "--to", form, "--out", str(out), "-q", "--allow-drift", *more]) == 0
        record, facts = (
            json.loads((out / "export.json").read_text()),
            shown(trained)[f"{form} {kind}".strip()],
        )
        assert facts.verdict == record["parity"]["verdict"]
        assert facts.twin_difference == record["parity"]["twin"]["largest_difference"]
        assert 0 < facts.bytes <= sum(each.stat().st_size for each in out.iterdir())
    assert list(shown(trained)) == ["peft", "merged float32", "merged bfloat16"]
    runtime = shown(trained)["merged float32"].runtime
    assert runtime == f"transformers {importlib.metadata.version('transformers')}"
    assert (
        replace(RunRecord.from_json((trained / "record.json").read_text()), exports=before.exports) == before
    )


def test_a_refused_export_is_shown_with_why(trained: Path) -> None:
    def refused() -> None:
        with reported_exports(trained, lambda event: None) as tell:
            tell(gated("gguf", "q4_0", "drifted"))
            raise ExportError("too much is lost")

    with pytest.raises(ExportError, match="too much is lost"):
        refused()
    found = shown(trained)["gguf q4_0"]
    assert (found.verdict, found.words, found.kept) == ("drifted", "it has drifted", False)
    assert found.twin_difference is None  # infinite, which JSON cannot say
    assert "drifted; not written" in (trained / "report.html").read_text()


def test_a_bundle_shows_all_its_exports_or_that_none_was_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bundle", str(trained), "--to", "peft", "--to", "merged", "--allow-drift", "-q", "--out"]
    monkeypatch.setattr("addenda.export.bundle._write_selftest", _no_room)
    assert run([*arguments, str(tmp_path / "first")]) != 0
    assert {name: each.kept for name, each in shown(trained).items()} == {
        "peft": False,
        "merged float32": False,
    }
    monkeypatch.undo()
    assert run([*arguments, str(tmp_path / "second")]) == 0
    assert all(each.kept for each in shown(trained).values())


def _no_room(*_arguments: object) -> None:
    raise ExportError("there is no room")


def test_an_adapter_outside_a_run_is_exported_and_nothing_else_is_written(
    trained: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(trained / "adapter", tmp_path / "alone" / "adapter"))
    before = sorted(alone.parent.rglob("*"))
    out = str(tmp_path / "out")
    assert run(["export", str(alone), "--to", "peft", "--out", out, "-q", "--allow-drift"]) == 0
    assert sorted(alone.parent.rglob("*")) == before
    assert shown(trained) == {}


@pytest.mark.parametrize("hinder", ["read-only", "another version", "in use", "trained anew"])
def test_a_report_that_cannot_be_written_is_a_warning_and_stays_as_it_was(
    trained: Path, hinder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    before = (trained / "report.html").read_text()
    if hinder == "read-only":
        monkeypatch.setattr(exports, "write_text", _refuse)
    elif hinder == "another version":
        (trained / "record.json").write_text('{"name": 3}')
    with (
        (trained / ".lock").open("a") as lock,
        reported_exports(trained, lambda event: notes.append(event.text)) as tell,
    ):
        tell(gated("peft", None))
        if hinder == "in use":
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif hinder == "trained anew":
            record = json.loads((trained / "record.json").read_text())
            (trained / "record.json").write_text(json.dumps(record | {"finished": "2031-01-01T00:00:00Z"}))
    assert notes[0].startswith("warning")
    assert (trained / "report.html").read_text() == before


def _refuse(path: Path, _text: str) -> None:
    raise OSError(errno.EROFS, "Read-only file system", path)
