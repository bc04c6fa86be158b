"""Hold functions, files and rooms to their sizes, and print the lines of each room beside its budget.

The aim is code that is easy to take in, not few lines: lines are counted as the formatter leaves them, blank ones
and comments included, and a function's docstring does not count towards its length. Raising a budget is a change of
one line here that says why.
"""

from __future__ import annotations

import ast
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "addenda"

FUNCTION_LIMIT = 60
FILE_LIMIT = 500
LONG_FUNCTIONS = {"train/loop.py": 120}  # one function there: a training loop is read in one piece
BUDGETS = {
    "templates": 650,  # a process, its limits, the environment it renders in; control tokens told from text
    "kernels": 550,  # Python only: compile, load, call
    "memory": 250,
    "core": 9700,  # layer kinds, a third of it; hosts, compositions, mixtures, starts, sequences, parts, roundings
    "methods": 9500,  # some fifty papers, of which the docstrings are half
    "bases": 7400,  # four sources, each checked byte by byte; packing; lean forms, in batches too; formats; GPUs
    "data": 4700,  # six file formats, six row shapes, and 36 checks that each carry their page and two examples
    "train": 5400,  # checkpoints, locks, guards, memory, processes, forecasts, several runs at once, beside the loop
    "evals": 2600,  # half of it is the report: its charts, its sections, its text
    "export": 14500,  # a file for each method that PEFT has too, each format and each program; the gate
    "cli": 2500,  # a verb a file
    "sweeps": 1100,  # what to try, the search, the trials and their standing, going on with one
    "recipe": 2300,  # a run, and several on one base; what going on with one refuses
    "": 1250,  # the files beside the rooms: errors, folders, intervals, settings, TOML
    "conformance": 1500,  # properties of methods and the places on which they are tried; tests, in effect
}


class Function(NamedTuple):
    """One function: its name, its place, and its lines without the docstring."""

    name: str
    file: str
    line: int
    lines: int


def functions(source: str, file: str) -> list[Function]:
    """Return every function of a source text, nested ones and methods too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1 - docstring_lines(node)  # type: ignore[operator]
            found.append(Function(node.name, file, node.lineno, lines))
    return found


def docstring_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of lines that the docstring of ``node`` takes."""
    if ast.get_docstring(node, clean=False) is None:
        return 0
    first = node.body[0]
    return first.end_lineno - first.lineno + 1  # type: ignore[operator]


def problems(package: Path) -> list[str]:
    """Return one line for each function, file or room of ``package`` that is too long."""
    found = []
    for path in sorted(package.rglob("*.py")):
        file, source = path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")
        if (count := len(source.splitlines())) > FILE_LIMIT:
            found.append(f"{file}: {count} lines, limit {FILE_LIMIT}")
        long = [function for function in functions(source, file) if function.lines > FUNCTION_LIMIT]
        exempt = [f for f in long if f.lines <= LONG_FUNCTIONS.get(file, 0)][:1]
        found += [
            f"{file}:{f.line}: {f.name} has {f.lines} lines, limit {FUNCTION_LIMIT}"
            for f in long
            if f not in exempt
        ]
    for room, lines in room_lines(package).items():
        budget = BUDGETS.get(room)
        if budget is None:
            found.append(f"{room}: the room has no budget in tools/size.py")
        elif lines > budget:
            found.append(f"{room or 'beside the rooms'}: {lines} lines, budget {budget}")
    return found


def room_lines(package: Path) -> dict[str, int]:
    """Return the lines of Python in each room; ``""`` stands for the files beside the rooms."""
    totals: dict[str, int] = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).parts
        room = parts[0] if len(parts) > 1 else ""
        totals[room] = totals.get(room, 0) + len(path.read_text(encoding="utf-8").splitlines())
    return totals


def table(package: Path) -> str:
    """Return the sizes of the rooms, and how long their functions are, as text."""
    rows = [f"{'room':<18}{'files':>6}{'lines':>7}{'budget':>8}   {'function median / p90 / max'}"]
    for room, lines in sorted(room_lines(package).items()):
        paths = list((package / room).rglob("*.py") if room else package.glob("*.py"))
        lengths = sorted(f.lines for path in paths for f in functions(path.read_text(encoding="utf-8"), ""))
        spread = "-"
        if lengths:
            spread = (
                f"{statistics.median(lengths):.0f} / {lengths[int(0.9 * (len(lengths) - 1))]} / {lengths[-1]}"
            )
        name = room or "(beside the rooms)"
        rows.append(f"{name:<18}{len(paths):>6}{lines:>7}{BUDGETS.get(room, 0):>8}   {spread}")
    rows.append(f"{'all':<18}{'':>6}{sum(room_lines(package).values()):>7}{sum(BUDGETS.values()):>8}")
    return "\n".join(rows)


def main() -> int:
    """Print the table (unless ``--quiet``) and every problem; return 1 if there is one."""
    found = problems(PACKAGE)
    if "--quiet" not in sys.argv:
        print(table(PACKAGE))
    for problem in found:
        print(f"size: {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
