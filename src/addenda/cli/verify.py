"""``addenda verify``: the self-test of a bundle or an export."""

from __future__ import annotations

from dataclasses import asdict

import click

from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.verb import verb
from addenda.errors import ExportError

__all__ = ["command"]


@verb(
    "verify",
    examples=[
        "addenda verify bundles/support",
        "addenda verify bundles/support --base SmolLM2-135M-Instruct.Q4_1.gguf",
    ],
)
@click.argument("folder")
@click.option("--base", metavar="FILE", help="The base's GGUF file. [default: the bundle's own]")
def command(console: Console, folder: str, base: str | None) -> None:
    """Check that a bundle or an export is as it was written, and that it answers here as it was trained to."""
    from addenda.export.verify import verify

    with Display(console):
        found = verify(folder, base=base)
    if not found.passed:
        raise ExportError(
            f"'{folder}' does not pass its self-test",
            where={"found": found.words},
            hint="copy it anew; if that does not help, this machine's program computes otherwise",
        )
    console.result({"folder": folder, **asdict(found)}, found.words)
