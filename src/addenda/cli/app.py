"""The ``addenda`` command: finds the verb, runs it, and turns any failure into an exit code.

A verb's module is imported only when that verb is asked for, so help is instant; the one-line helps shown by
``addenda --help`` are therefore kept here, and a test holds them equal to the commands' own.
"""

from __future__ import annotations

import importlib
import os
import platform
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from addenda.cli.failures import EXIT_CODES, report
from addenda.errors import ConfigError, nearest

__all__ = ["VERBS", "cli", "main"]

VERBS = {
    "plan": "Show what would be adapted, and what it costs.",
    "check": "Check training data and show what would be trained on.",
    "train": "Adapt a model to data.",
    "sweep": "Try settings and say which are best.",
    "eval": "Measure a model, with or without an adapter, on data.",
    "chat": "Talk to a model, with or without an adapter.",
    "export": "Write an adapter in a form other tools load.",
    "bundle": "Put exports, their proof and a self-test into one folder.",
    "verify": "Run the self-test of a bundle or an export.",
    "models": "List the models that load by name.",
    "methods": "List the adaptation methods and their settings.",
    "doctor": "Check this machine and installation.",
}

EXAMPLES = """\
Examples:
  addenda doctor
  addenda check examples/data/support.jsonl --show 3
  addenda train examples/data/support.jsonl --out runs/support
  addenda chat --adapter runs/support/adapter --compare --prompt "Where is my parcel?"
  addenda export runs/support/adapter --to peft --out exported"""


class LazyGroup(click.Group):
    """A group whose verbs are modules of this package, imported when first needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"addenda.cli.{cmd_name}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            near = nearest(args[0], VERBS, count=1)
            raise ConfigError(
                f"no such verb '{args[0]}'",
                where={"verbs": " ".join(VERBS)},
                hint=f"did you mean '{near[0]}'?" if near else "'addenda --help' lists what each verb does",
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"\n{EXAMPLES}\n")
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    parts = [f"addenda {_version('addenda')}", f"python {platform.python_version()}"]
    parts += [f"{name} {_version(name)}" for name in ("torch", "transformers", "safetensors", "peft")]
    click.echo("\n".join(parts))
    ctx.exit()


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the versions of addenda and of what it runs on.",
)
def cli() -> None:
    """Adapt a pretrained model to your data on an ordinary computer, and see what it did.

    Every verb takes --json (one document on standard output), -q and -v. Results go to standard output,
    progress and notes to standard error. ADDENDA_DEBUG=1 shows tracebacks.
    """


def _terminate(signum: int, _frame: FrameType | None) -> None:
    from addenda.train.interrupt import Interrupted

    raise Interrupted(signum)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing but the verb's own output is printed."""
    try:
        code = cli.main(args=list(arguments), prog_name="addenda", standalone_mode=False)
        if sys.stdout is not None:  # None where the caller closed it
            sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    except BrokenPipeError:
        # The reader went away (`addenda models | head -1`); closing quietly is what it expects.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.exceptions.NoArgsIsHelpError as no_verb:
        click.echo(no_verb.format_message(), err=True)
        return 2
    except BaseException as error:  # noqa: BLE001  the one border where every failure becomes an exit code
        return report(error, as_json="--json" in arguments, debug=_asks_traceback(arguments))


def _asks_traceback(arguments: Sequence[str]) -> bool:
    short = sum(word.count("v") for word in arguments if word.startswith("-v") and set(word[1:]) == {"v"})
    return short + list(arguments).count("--verbose") >= 2


def main() -> None:
    """Entry point of the ``addenda`` command."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A terminal with an old encoding shows '?' where it has no character; it never crashes the command.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))
