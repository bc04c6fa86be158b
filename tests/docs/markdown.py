"""Read the code blocks of a Markdown page, and run them as a reader would.

A block is marked by an HTML comment on the line above its fence:

    <!-- not run: needs a GPU -->     shown only; the reason is listed by a test
    <!-- run: slow -->                run, but only in the slow suite

As a script it runs one page in the current folder: ``python markdown.py PAGE [--slow]``.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>not run|run): (?P<note>[^>]+?) -->\n)?```(?P<language>python|console)\n(?P<body>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One runnable block of a page."""

    page: Path
    line: int
    language: str
    body: str
    mark: str
    note: str

    @property
    def is_run(self) -> bool:
        return self.mark != "not run"

    @property
    def is_slow(self) -> bool:
        return self.mark == "run" and self.note == "slow"


def blocks(page: Path) -> list[Block]:
    """Every python and console block of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        mark, note = match["mark"] or "", match["note"] or ""
        found.append(Block(page, line, match["language"], match["body"], mark, note))
    return found


def run(block: Block, names: dict[str, object], folder: Path) -> None:
    """Run one block in ``folder``; Python blocks of a page share ``names``. A wrong output is an error."""
    if block.language == "console":
        run_console(block, folder)
    elif ">>>" in block.body:
        run_session(block, names)
    else:
        # Blank lines before the code make the numbers in a traceback those of the page.
        exec(compile("\n" * (block.line - 1) + block.body, str(block.page), "exec"), names)


def run_session(block: Block, names: dict[str, object]) -> None:
    """Run a block of ``>>>`` lines and compare what it prints."""
    session = doctest.DocTestParser().get_doctest(
        block.body, names, block.page.name, str(block.page), block.line - 1
    )
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(session, out=report.append, clear_globs=False)
    names.update(session.globs)
    assert not report, "".join(report)


def commands(block: Block) -> list[tuple[str, str]]:
    """The (command, expected output) pairs of a console block; a backslash continues a command."""
    pairs: list[list[str]] = []
    continued = False
    for line in block.body.splitlines():
        if continued:
            pairs[-1][0] += "\n" + line
        elif line.startswith("$ "):
            pairs.append([line[2:], ""])
        else:
            assert pairs, f"{block.page.name}:{block.line}: output before the first command"
            pairs[-1][1] += line + "\n"
        continued = line.endswith("\\") and (continued or line.startswith("$ "))
    return [(command, output) for command, output in pairs]


def run_console(block: Block, folder: Path) -> None:
    """Run the commands of a block with this environment's programs first; compare the outputs that are shown."""
    binaries = Path(sys.executable).parent
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "NO_COLOR": "1", "COLUMNS": "100"}
    for command, expected in commands(block):
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
        )
        place = f"{block.page.name}:{block.line}: $ {command}"
        assert done.returncode == 0, f"{place}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
        if expected.strip():
            same = doctest.OutputChecker().check_output(expected, done.stdout, OPTIONS)
            assert same, f"{place}\nexpected:\n{expected}\ngot:\n{done.stdout}"


def run_page(page: Path, *, slow: bool, folder: Path) -> int:
    """Run the blocks of a page in order, the slow ones only if asked; returns how many were run."""
    names: dict[str, object] = {"__name__": "__main__"}
    chosen = [block for block in blocks(page) if block.is_run and (slow or not block.is_slow)]
    for block in chosen:
        run(block, names, folder)
    return len(chosen)


if __name__ == "__main__":
    print(run_page(Path(sys.argv[1]), slow="--slow" in sys.argv, folder=Path.cwd()), "blocks ran")
