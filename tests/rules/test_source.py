"""What the source may not contain, whoever writes it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import addenda.errors

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "addenda"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))

ERRORS = {name for name in addenda.errors.__all__ if name[0].isupper()}
PICKLES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
GRAB_BAGS = {"common", "helper", "helpers", "misc", "shared", "stuff", "tools", "util", "utils"}

# A raise without a hint, by file and text that the line holds, and why there is nothing to advise.
NO_HINT: dict[tuple[str, str], str] = {}


def nodes(paths: list[Path]) -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node of the files, with its place for the message."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}", node


def called_name(node: ast.AST) -> str:
    """The dotted name that a call calls, or an empty string."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def test_no_module_is_a_grab_bag() -> None:
    assert SOURCES
    named = [
        str(path.relative_to(PACKAGE)) for path in SOURCES if GRAB_BAGS & set(path.with_suffix("").parts)
    ]
    names = {part.strip("_") for path in SOURCES for part in path.relative_to(PACKAGE).with_suffix("").parts}
    assert not GRAB_BAGS & names, named


def test_nothing_unpickles() -> None:
    found = []
    for place, node in nodes(SOURCES):
        if isinstance(node, ast.Import):
            found += [f"{place}: import {a.name}" for a in node.names if a.name.split(".")[0] in PICKLES]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            found.append(f"{place}: from {node.module}")
        if called_name(node) in {"torch.load", "torch.save", "torch.package.PackageImporter"}:
            found.append(f"{place}: {called_name(node)}")
    assert not found, found


def test_nothing_runs_code_from_data_or_from_a_model_repository() -> None:
    found = []
    for place, node in nodes(SOURCES):
        if (
            isinstance(node, ast.keyword)
            and node.arg == "trust_remote_code"
            and ast.unparse(node.value) != "False"
        ):
            found.append(f"{place}: trust_remote_code={ast.unparse(node.value)}")
        if called_name(node) in {"eval", "exec", "compile", "os.system", "__import__"}:
            found.append(f"{place}: {called_name(node)}")
        if isinstance(node, ast.keyword) and node.arg == "shell" and ast.unparse(node.value) == "True":
            found.append(f"{place}: shell=True")
    assert not found, found


def strings(path: Path) -> Iterator[tuple[str, str]]:
    """Every string literal of a file, without the docstrings and the strings that document a field."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def test_no_path_of_one_machine_is_named() -> None:
    pattern = re.compile(r"^/(home|root|Users|work|opt|mnt|usr|var|private)/\w")
    found = [f"{place}: {text}" for path in SOURCES for place, text in strings(path) if pattern.search(text)]
    assert not found, found


def room_of(path: Path) -> str:
    """The room that a file is in, or its own name beside the rooms."""
    return path.relative_to(PACKAGE).parts[0]


def test_only_the_command_line_prints() -> None:
    own_processes = {  # that report by this stream: two to their parents, and a script that leaves with a bundle
        PACKAGE / "bases" / "gguf_convert.py",
        PACKAGE / "export" / "runtimes" / "llama_server.py",
        PACKAGE / "export" / "selftest_llama.py",
    }
    named = [path for path in SOURCES if room_of(path) not in {"cli", "__main__.py"}]
    quiet = [path for path in named if path not in own_processes]
    loud = {"print", "input", "sys.stdout.write", "sys.stderr.write", "pprint.pprint"}
    assert quiet
    assert not [f"{place}: {called_name(node)}" for place, node in nodes(quiet) if called_name(node) in loud]


def test_only_training_knows_optimizers() -> None:
    elsewhere = [path for path in SOURCES if room_of(path) != "train"]
    dotted = [
        (place, ast.unparse(node)) for place, node in nodes(elsewhere) if isinstance(node, ast.Attribute)
    ]
    assert dotted
    assert not [f"{place}: {text}" for place, text in dotted if text.startswith(("torch.optim", "optim."))]


def error_raises() -> Iterator[tuple[str, ast.Call]]:
    """Every call that makes one of our errors, in ``src`` outside errors.py."""
    for path in SOURCES:
        if path.name == "errors.py":
            continue
        for place, node in nodes([path]):
            if isinstance(node, ast.Call) and called_name(node).rsplit(".", 1)[-1] in ERRORS:
                yield place, node


def test_every_error_carries_a_hint() -> None:
    bare = []
    for place, call in error_raises():
        # A bare ** passes on what another function built; it is held to the rule where it is built.
        hinted = any(keyword.arg in ("hint", None) for keyword in call.keywords)
        line = ast.unparse(call)
        excused = any(place.startswith(file) and text in line for file, text in NO_HINT)
        if not hinted and not excused:
            bare.append(f"{place}: {line[:100]}")
    assert not bare, "\n".join(bare)


def test_error_messages_read_as_one_house() -> None:
    """Lower-case first letter, no full stop at the end, and none of the phrases that say nothing."""
    bad = []
    for place, call in error_raises():
        text = literal_text(call.args[0]) if call.args else ""
        empty_phrase = re.search(r"please|something went wrong|invalid input", text, re.IGNORECASE)
        shouted = re.match(r"[A-Z][a-z]", text) and text.split()[0] not in {"ExecuTorch", "Python", "PyTorch"}
        if text and (empty_phrase or shouted or text.endswith(".")):
            bad.append(f"{place}: {text[:100]}")
    assert not bad, "\n".join(bad)


def literal_text(node: ast.expr) -> str:
    """The literal text of a string or f-string; values stand as ``?``."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "?" for part in node.values)
    return ""


def test_nothing_is_left_to_do() -> None:
    marks = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
    own = Path(__file__)
    paths = [path for path in [*SOURCES, *TESTS, *(ROOT / "tools").glob("*.py")] if path != own]
    found = [str(path.relative_to(ROOT)) for path in paths if marks.search(path.read_text(encoding="utf-8"))]
    assert not found, found


ASSERTING = re.compile(r"^(assert_|check_|expect_|verify_)|^(raises|warns|fail|approx|assert_close)$")


def asserts_something(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a test can fail by its own word: an assert, ``pytest.raises``, or a call named as an assertion."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call) and ASSERTING.search(called_name(node).rsplit(".", 1)[-1]):
            return True
    return False


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_every_test_asserts_something(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    empty = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for node in ast.walk(tree)
        if isinstance(node, kinds) and node.name.startswith("test_") and not asserts_something(node)
    ]
    assert not empty, empty
