"""Every Python and console block of the README and of the pages under docs/ does what the page says."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNNER = Path(__file__).with_name("markdown.py")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def load_runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("markdown_runner", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


markdown = load_runner()


def cases() -> list[object]:
    """One case for the fast blocks of each page, and one more, marked slow, where it has slow ones."""
    found = []
    for page in PAGES:
        runnable = [block for block in markdown.blocks(page) if block.is_run]
        name = str(page.relative_to(ROOT))
        if any(not block.is_slow for block in runnable):
            found.append(pytest.param(page, False, id=name))
        if any(block.is_slow for block in runnable):
            found.append(
                pytest.param(
                    page, True, id=f"{name}-slow", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]
                )
            )
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the files that the pages use, and nothing else."""
    if (ROOT / "examples").exists():
        shutil.copytree(
            ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


@pytest.mark.parametrize(("page", "slow"), cases())
def test_blocks_of_the_page_run(page: Path, slow: bool, folder: Path) -> None:
    """In a process of its own, as a reader would run them; a warning is an error."""
    command = [sys.executable, "-W", "error", str(RUNNER), str(page), *["--slow"][: int(slow)]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-3]) > 0


def test_every_block_that_is_not_run_says_why() -> None:
    skipped = [block for page in PAGES for block in markdown.blocks(page) if not block.is_run]
    for block in skipped:
        print(f"{block.page.relative_to(ROOT)}:{block.line}: {block.note}")
    assert all(len(block.note.split()) >= 2 for block in skipped)


def test_every_mark_is_understood() -> None:
    unknown = [
        f"{page.relative_to(ROOT)}: {line}"
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith(("<!-- run", "<!-- not run"))
        and line != "<!-- run: slow -->"
        and "not run: " not in line
    ]
    assert not unknown


def test_every_link_between_pages_leads_somewhere() -> None:
    dead = []
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert not dead


# ----------------------------------------------------------------------------------------- the runner itself can fail


def page_with(tmp_path: Path, text: str) -> list[object]:
    page = tmp_path / "page.md"
    page.write_text(text)
    return markdown.blocks(page)


def test_marks_languages_and_lines_are_read(tmp_path: Path) -> None:
    text = (
        "# A\n```python\nx = 1\n```\n<!-- not run: a reason -->\n```console\n$ false\n```\n"
        "<!-- run: slow -->\n```python\ny\n```\n```json\n{}\n```\n"
    )
    found = [(b.line, b.language, b.is_run, b.is_slow) for b in page_with(tmp_path, text)]
    assert found == [(3, "python", True, False), (7, "console", False, False), (11, "python", True, True)]


def test_a_failing_block_fails_with_the_line_of_the_page(tmp_path: Path) -> None:
    [block] = page_with(tmp_path, "text\n\n```python\na = 1\nb = a / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as caught:
        markdown.run(block, {}, tmp_path)
    assert caught.traceback[-1].lineno + 1 == 5


def test_a_wrong_output_fails(tmp_path: Path) -> None:
    good, bad = page_with(tmp_path, "```python\n>>> x = 2\n>>> x + 1\n3\n```\n```python\n>>> x\n4\n```\n")
    names: dict[str, object] = {}
    markdown.run(good, names, tmp_path)
    with pytest.raises(AssertionError, match=r"Expected:\s+4\s+Got:\s+2"):
        markdown.run(bad, names, tmp_path)


def test_commands_run_in_the_folder_and_their_output_is_compared(tmp_path: Path) -> None:
    text = (
        "```console\n$ echo one > f; \\\n  echo two\ntwo\n$ cat f\none\n```\n"
        "```console\n$ cat f\nthree\n```\n"
        "```console\n$ exit 3\n```\n"
    )
    good, wrong, failing = page_with(tmp_path, text)
    markdown.run(good, {}, tmp_path)
    with pytest.raises(AssertionError, match=r"expected:\s+three\s+got:\s+one"):
        markdown.run(wrong, {}, tmp_path)
    with pytest.raises(AssertionError, match="exit code 3"):
        markdown.run(failing, {}, tmp_path)
