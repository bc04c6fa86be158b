"""What every verb shares: ``--json``, ``-q``, ``-v``, and a help page that ends with examples."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import click

from addenda.cli.app import VERBS
from addenda.cli.console import Console

__all__ = ["Verb", "verb"]


class Verb(click.Command):
    """A command whose help page ends with examples, shown as they are typed."""

    examples: Sequence[str] = ()

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options, and where the exit codes are."""
        lines = "".join(f"  {example}\n" for example in self.examples)
        formatter.write(f"\nExamples:\n{lines}\nExit codes: 'addenda --help' lists them.\n")


def _hush() -> None:
    """Keep libraries from printing what nobody who runs a command can act on; ``-v`` shows it.

    torchao, which the extra ``executorch`` brings, tells of parts for GPUs that it cannot load whenever transformers
    looks for it.
    """
    for name in ("torch.utils._pytree", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def verb(name: str, *, examples: Sequence[str]) -> Callable[[Callable[..., Any]], Verb]:
    """Make a click command of a function that takes ``console`` and its own options.

    Its docstring is the help page, its one-line help the one in `addenda.cli.app.VERBS`.
    """

    def decorate(function: Callable[..., Any]) -> Verb:
        @functools.wraps(function)
        def with_console(*args: Any, as_json: bool, quiet: bool, verbose: int, **options: Any) -> Any:
            console = Console(json=as_json, verbosity=-1 if quiet else verbose)
            if not verbose:
                _hush()
            return function(*args, console=console, **options)

        common = (
            click.option("-v", "--verbose", count=True, help="More notes; twice: tracebacks."),
            click.option("-q", "--quiet", is_flag=True, help="No progress and no notes; errors still show."),
            click.option(
                "--json", "as_json", is_flag=True, help="Print one JSON document on standard output."
            ),
        )
        for option in common:
            option(with_console)
        command = click.command(name, cls=Verb, short_help=VERBS[name])(with_console)
        command.examples = tuple(examples)
        return command

    return decorate
