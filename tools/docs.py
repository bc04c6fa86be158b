"""Write the reference pages from the code itself; ``--check`` compares them with what is there.

Everything on these pages is read from the registries, the command line and the settings classes, so that a page
cannot say what the code does not do. Nothing under docs/reference/ is edited by hand.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
README = ROOT / "README.md"
DIFFERENCES = ROOT / "tests" / "parity" / "peft_differences.json"
"""What `make parity-table` measured."""
NOTE = "<!-- Written by `make docs` from the code. Do not edit. -->\n"

# The layers of one block of a Llama-like model, to show which of them a method adapts unless told otherwise.
LLAMA_LAYERS = [
    *(f"model.layers.0.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]


class Setting(NamedTuple):
    """One field of a settings class, as a page shows it."""

    name: str
    type: str
    default: str
    text: str


def settings_of(cls: type) -> list[Setting]:
    """Return the fields of a dataclass with the string that stands under each in its source."""
    texts, types = {}, {}
    for each in (base for base in cls.__mro__ if dataclasses.is_dataclass(base)):
        [body] = (node.body for node in ast.walk(source_tree(each)) if isinstance(node, ast.ClassDef))
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                types.setdefault(node.target.id, ast.unparse(node.annotation))
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    texts.setdefault(node.target.id, " ".join(str(following.value.value).split()))
    own = [field for field in dataclasses.fields(cls) if field.name in types]
    return [Setting(f.name, types[f.name], default_of(f), texts.get(f.name, "")) for f in own]


def source_tree(cls: type) -> ast.Module:
    """Return the syntax tree of a class's own source."""
    return ast.parse(textwrap.dedent(inspect.getsource(cls)))


def default_of(field: dataclasses.Field[object]) -> str:
    """Return a field's default as a recipe would spell it."""
    value: object = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is dataclasses.MISSING:
        return "required"
    return spelled(value)


def spelled(value: object) -> str:
    """Return a value as a recipe spells it; ``None`` means that the key is left out."""
    if value is None:
        return "unset"
    if isinstance(value, tuple):
        value = list(value)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value!r}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; bars inside cells are escaped."""
    lines = [header, ["---"] * len(header), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def settings_table(cls: type) -> str:
    """Return the table of a settings class."""
    rows = [[f"`{s.name}`", f"`{s.type}`", s.default, s.text] for s in settings_of(cls)]
    return table(["key", "type", "default", "meaning"], rows)


def page(title: str, intro: str, *parts: str) -> str:
    """Return a whole page."""
    return "\n\n".join([f"{NOTE}\n# {title}", intro, *(part.strip() for part in parts)]) + "\n"


# ----------------------------------------------------------------------------------------------------------- the pages


def cli_page() -> str:
    """Return the help of the command and of each of its verbs."""
    import click

    from addenda.cli.app import VERBS, cli

    def help_of(command: click.Command, name: str) -> str:
        # As the command makes it, but neither wider nor narrower where the terminal is.
        context = command.make_context(name, [], resilient_parsing=True, **settings)
        lines = (line.rstrip() for line in command.get_help(context).strip().splitlines())
        return "```text\n" + "\n".join(lines) + "\n```"

    settings = {**cli.context_settings, "terminal_width": 100, "max_content_width": 100}
    verbs = []
    for verb in VERBS:
        command = cli.get_command(click.Context(cli), verb)
        assert command is not None
        verbs.append(f"## addenda {verb}\n\n{help_of(command, f'addenda {verb}')}")
    intro = "What `addenda --help` and `addenda VERB --help` print."
    return page("Command line", intro, help_of(cli, "addenda"), *verbs)


def methods_page() -> str:
    """Return every registered method: what it does, what it can, its settings, its exceptions."""
    from addenda.conformance.matrix import matrix
    from addenda.core import registry

    sections = [method_section(name, registry.get(name)) for name in registry.names()]
    standing = (
        "## Where they stand\n\nThe places on which the conformance suite tries each method, with all its declared "
        "variants, and those at which the plan refuses it. `python -m addenda.conformance` runs the suite and prints "
        f"the same table of what it found.\n\n```text\n{matrix(registry.names())}\n```"
    )
    intro = (
        "Every method that `[method] name = ...` in a recipe, `--method` on the command line, and "
        "`addenda.core.registry.get` know. The learning rate is the peak that a run takes when none is set."
    )
    return page("Methods", intro, methods_table(""), standing, *sections)


def starts_page() -> str:
    """Return every start of a low-rank update, with its settings."""
    from addenda.core import starts

    rows, sections = [], []
    for name in starts.names():
        start = starts.get(name)
        moved = "yes" if start.moved else "no"
        rows.append([f"[`{name}`](#{name})", summary(start), start.needs or "nothing", moved])
        about = f"## {name}\n\n```text\n{inspect.getdoc(start)}\n```"
        sections.append("\n\n".join([about, settings_table(start)] if dataclasses.fields(start) else [about]))
    intro = (
        "How the factors of a low-rank update can begin: `start` and `start_settings` of the method `lora`. What it "
        "needs beside the weight is observed beforehand. Those that are taken off double the rank of the forward pass."
    )
    return page("Starts", intro, table(["start", "what it is", "needs", "taken off again"], rows), *sections)


def peft_page() -> str:
    """Return what goes to PEFT's folders and back: the tensors, the measured differences, what is refused."""
    from addenda.export.peft.form import forms
    from addenda.export.peft.reading import UNREAD

    measured = json.loads(DIFFERENCES.read_text(encoding="utf-8"))
    rows = []
    for name, form in sorted(forms().items(), key=lambda entry: (entry[1].peft_type, entry[0])):
        numbered = [re.sub(r"\.\d+\b", ".N", tensor) for tensor in [*form.names, *form.shared_names]]
        tensors = ", ".join(f"`{tensor}`" for tensor in dict.fromkeys(numbered))
        ways = measured["differences"].get(name, {})
        figures = [ways[way]["largest"] if way in ways else None for way in ("written", "read")]
        shown = ["-" if figure is None else f"{figure:.1e}" if figure else "0" for figure in figures]
        rows.append([form.peft_type, f"[`{name}`](methods.md#{name})", tensors, *shown])
    table_of_forms = table(
        ["PEFT's type", "method", "tensors of a layer, and shared ones", "ours under PEFT", "PEFT's here"],
        rows,
    )
    refused = [
        [kind, ", ".join(f"`{key}`" for key in keys)] for kind, keys in measured["refused"].items() if keys
    ]
    unread = [[kind, why] for kind, why in UNREAD.items()]
    packages = ", ".join(f"{name} {version}" for name, version in measured["packages"].items())
    intro = (
        "`addenda export --to peft` writes an adapter as PEFT's `save_pretrained` does, and PEFT's folders are read as "
        "`addenda.export.peft.import_peft` finds them. The last two columns are the largest difference between PEFT's "
        "answers and ours in float32, relative to the largest of them, over all cases of the parity tests: random "
        "weights on small models and layers; 0 says that they are equal bit for bit. A dash stands where a folder "
        "does not tell the method from another, as which it is read. Measured with "
        f"{packages} by `make parity-table`."
    )
    return page(
        "PEFT's folders",
        intro,
        table_of_forms,
        "## Settings that are refused\n\nWhere one of these is set, reading is refused and names it; every other "
        "setting of the type is read, or changes nothing of what a trained adapter computes.\n\n"
        + table(["PEFT's type", "settings"], refused),
        *([f"## Not read\n\n{table(['type', 'why'], unread)}"] if unread else []),
    )


def methods_table(link: str) -> str:
    """Return one row for each method; ``link`` is the page that describes them."""
    from addenda.core import registry

    rows = []
    for name in registry.names():
        method = registry.get(name)
        mergeable, kinds = "yes" if method.mergeable else "no", ", ".join(method.kinds)
        rows.append(
            [f"[`{name}`]({link}#{name})", summary(method), mergeable, kinds, f"{method.learning_rate:g}"]
        )
    return table(["method", "what it does", "mergeable", "layer kinds", "learning rate"], rows)


def readme(text: str) -> str:
    """Return the README's text with the list of methods between its marks written anew."""
    start, end = "<!-- methods: written by `make docs` -->", "<!-- end of methods -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"docs: README.md lacks the marks '{start}' and '{end}'")
    return f"{before}{start}\n\n{methods_list('docs/reference/methods.md')}\n\n{end}{after}"


def methods_list(link: str) -> str:
    """Return the names of all methods in one paragraph; ``link`` is the page that describes them."""
    from addenda.core import registry

    names = registry.names()
    text = f"[{len(names)} methods]({link}): " + ", ".join(f"`{name}`" for name in names) + "."
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def method_section(name: str, method: type) -> str:
    """Return what the page says of one method."""
    targets = default_targets(method)
    wrong = [f"- {what}: {why}." for what, why in method.exceptions.items()]
    exceptions = (
        "Every property of the conformance suite holds."
        if not wrong
        else "Exceptions:\n\n" + "\n".join(wrong)
    )
    about = inspect.getdoc(method) or ""
    refused = refused_places(name)
    return "\n\n".join(
        [
            f"## {name}",
            f"`{method.__module__}.{method.__qualname__}`. Adapts, unless targets are named: {targets}.",
            f"```text\n{about}\n```",
            settings_table(method),
            exceptions,
            *([f"Refused, though of a kind that it adapts:\n\n{refused}"] if refused else []),
        ]
    )


def refused_places(name: str) -> str:
    """Say on which places of the conformance suite a method is refused for another reason than their kind."""
    from addenda.conformance.matrix import refusals

    found = {
        reason: places for reason, places in refusals(name).items() if "adapts no layer of kind" not in reason
    }
    return "\n".join(
        f"- {', '.join(f'`{p}`' for p in places)}: {reason}." for reason, places in found.items()
    )


def default_targets(method: type) -> str:
    """Say which layers a method with its default settings adapts when no targets are named."""
    paths = {"transformer": ["model"], "attention": ["model.layers.0.self_attn"]}
    targets = method().default_targets(paths.get(method.kinds[0], LLAMA_LAYERS))
    if isinstance(targets, str):
        return f"`{targets}`"
    return ", ".join(f"`{target}`" for target in targets) + " in a Llama-like model"


def recipe_page() -> str:
    """Return every key of a recipe, by section."""
    from addenda.core.contract import Method
    from addenda.settings import Recipe, resolve

    hints = typing.get_type_hints(Recipe, localns={"Method": Method})
    top = {key: value for key, value in resolve().values().items() if "." not in key}
    rows = [
        [f"`{s.name}`", f"`{s.type}`", spelled(top[s.name]), s.text]
        for s in settings_of(Recipe)
        if s.name in top
    ]
    sections = [f"## Above the sections\n\n{table(['key', 'type', 'default', 'meaning'], rows)}"]
    for field in dataclasses.fields(Recipe):
        cls = hints[field.name]
        if cls is Method:
            sections.append(
                "## [method]\n\n`name` is one of the [methods](methods.md) (default `lora`), `targets` a list of "
                'layer-name suffixes or `"all-linear"` (default: the method\'s own). The other keys are the settings '
                "of the method."
            )
        elif dataclasses.is_dataclass(cls):
            about = (inspect.getdoc(cls) or "").split("\n\n")[0]
            sections.append(f"## [{field.name}]\n\n{about}\n\n{settings_table(typing.cast('type', cls))}")
    intro = (
        "A recipe is a complete run as data: a TOML file with the sections below, given by `--recipe`. Any key can be "
        "set on the command line too: `--set section.key=value`, spelled as in TOML. Unknown keys are errors. A run "
        "writes `recipe.resolved.toml`, in which each value stands with its origin; that file is itself a recipe."
    )
    return page("Recipe", intro, *sections)


def findings_page() -> str:
    """Return every code that a check of training data can report."""
    from addenda.data.checks import CHECKS

    rows, sections = [], []
    for code in sorted(CHECKS):
        check = CHECKS[code]
        rows.append([f"[`{code}`](#{code})", check.severity, check.summary()])
        about = (inspect.getdoc(check) or "").split("\n\n", 1)
        facts = paragraphs(about[1]) if len(about) > 1 else ""
        sections.append(f"## {code}\n\n{about[0]}\n\n{facts}\n\nFix, as printed: {check.fix}.")
    intro = (
        "What `addenda check` and `addenda train` report about training data. An error keeps a run from starting "
        "(exit code 3); a warning does not. A check may soften or sharpen its severity where its text says so."
    )
    return page("Data findings", intro, table(["code", "severity", "what"], rows), *sections)


def paragraphs(text: str) -> str:
    """Return lines of the form ``Label: words`` (continued below) as Markdown items with the label in bold."""
    labels = ("What it finds", "Why it matters", "Known limits", "Example", "What to do", "References")
    items: list[str] = []
    for line in text.splitlines():
        label = next((label for label in labels if line.startswith(f"{label}:")), None)
        if label:
            items.append(f"- **{label}**{line.removeprefix(label).rstrip()}")
        elif line.strip() and items:
            items[-1] += f" {line.strip()}"
    return "\n".join(items)


def summary(cls: type) -> str:
    """Return the first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").split("\n", 1)[0]


PAGES: Mapping[str, Callable[[], str]] = {
    "cli.md": cli_page,
    "findings.md": findings_page,
    "methods.md": methods_page,
    "peft.md": peft_page,
    "recipe.md": recipe_page,
    "starts.md": starts_page,
}


def stale(folder: Path) -> list[str]:
    """Return the names of the pages in ``folder`` that are missing, differ from the code, or belong to nothing."""
    found = [
        name
        for name, write in PAGES.items()
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != write()
    ]
    return found + sorted(path.name for path in folder.glob("*") if path.name not in PAGES)


def main() -> int:
    """Write the pages and the README's list of methods, or compare them; return 1 if one is stale."""
    written = README.read_text(encoding="utf-8")
    wanted = readme(written)
    if "--check" in sys.argv:
        found = [f"docs/reference/{name}" for name in stale(FOLDER)] + ["README.md"] * (wanted != written)
        for name in found:
            print(f"docs: {name} does not say what the code does: run 'make docs'", file=sys.stderr)
        return 1 if found else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, write in PAGES.items():
        (FOLDER / name).write_text(write(), encoding="utf-8")
    README.write_text(wanted, encoding="utf-8")
    print(f"docs: wrote {len(PAGES)} pages in docs/reference/ and the list of methods in README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
