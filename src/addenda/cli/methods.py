"""``addenda methods``: the adaptation methods and their settings."""

from __future__ import annotations

import click

from addenda.cli.console import Console, table
from addenda.cli.verb import verb

__all__ = ["command"]


@verb(
    "methods",
    examples=["addenda methods", "addenda methods lora", "addenda methods --json"],
)
@click.argument("name", required=False)
def command(console: Console, name: str | None) -> None:
    """List the adaptation methods, or show one with all its settings."""
    from addenda.core import registry

    if name is None:
        documents = [_document(each) for each in registry.names()]
        console.result({"methods": documents}, lambda: _listing(documents))
    else:
        console.result(_document(name), lambda: _page(name))


def _document(name: str) -> dict[str, object]:
    from addenda.core import registry

    method = registry.get(name)
    return {
        "name": name,
        "summary": (method.__doc__ or "").strip().splitlines()[0],
        "mergeable": method.mergeable,
        "learning_rate": method.learning_rate,
        "layer_kinds": list(method.kinds),
        "settings": _settings(name),
        "exceptions": dict(method.exceptions),
    }


def _settings(name: str) -> dict[str, object]:
    """Each setting of the method with its default, None where it has to be given or is derived."""
    import dataclasses

    from addenda.core import registry

    found: dict[str, object] = {}
    for field in dataclasses.fields(registry.get(name)):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        found[field.name] = None if made is dataclasses.MISSING else made
    return found


def _listing(documents: list[dict[str, object]]) -> str:
    rows = [
        [d["name"], "yes" if d["mergeable"] else "no", f"{d['learning_rate']:g}", d["summary"]]
        for d in documents
    ]
    return table(rows, ["method", "mergeable", "learning rate", "what it does"])


def _page(name: str) -> str:
    import inspect

    from addenda.core import registry

    method = registry.get(name)
    settings = [f"  method.{key} = {value!r}" for key, value in _settings(name).items()]
    return "\n".join(
        [
            name,
            "",
            inspect.getdoc(method) or "",
            "",
            "Settings (--set method.KEY=VALUE) and their defaults:",
            *settings,
            "",
            f"Mergeable: {'yes' if method.mergeable else 'no'}. Layer kinds: {', '.join(method.kinds)}.",
            *(f"Exception: {what}: {why}." for what, why in method.exceptions.items()),
        ]
    )
