"""What ``addenda sweep`` refuses before it reads anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from addenda.cli.app import run


def test_every_key_of_the_table_that_a_sweep_does_not_have_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[sweep]\ntrails = 3\nserach = "optuna"\nover = 4\n', encoding="utf-8")
    assert run(["sweep", "none.jsonl", "--recipe", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert "did you mean 'trials'?" in said
    assert "did you mean 'search'?" in said
    assert "sweep.over" in said
    assert "must be a table" in said


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["other.jsonl"], "DATA"),
        (["--valid", "other.jsonl"], "--valid"),
        (["--recipe", "other.toml"], "--recipe"),
        (["--set", "train.epochs=9"], "--set"),
        (["--base", "other"], "--base"),
        (["--method", "ia3"], "--method"),
        (["--targets", "q_proj"], "--targets"),
        (["--over", "method.rank=2"], "--over"),
        (["--search", "grid"], "--search"),
        (["--force"], "--force"),
    ],
)
def test_a_sweep_goes_on_as_it_was_begun(
    more: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trials that are there and trials that follow would otherwise differ by more than the table says."""
    table = '[sweep.over]\n"method.rank" = [2, 4]\n'
    (tmp_path / "sweep.toml").write_text(table, encoding="utf-8")
    assert run(["sweep", "--resume", "--out", str(tmp_path), *more]) == 2
    assert f"takes no {named}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.toml"]


def test_resuming_needs_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "--resume"]) == 2
    assert "--resume needs --out" in capsys.readouterr().err
    assert run(["sweep", "--resume", "--out", str(tmp_path)]) != 0
    assert "no sweep to resume" in capsys.readouterr().err
