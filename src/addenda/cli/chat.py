"""``addenda chat``: talk to a model, with or without an adapter, or to both at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from addenda.cli.columns import side_by_side
from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.verb import verb
from addenda.errors import ConfigError

if TYPE_CHECKING:
    from addenda.bases import LoadedBase
    from addenda.core import Handle

__all__ = ["command"]

_HELP = "/reset forgets the conversation, /exit or Ctrl-D ends"


@dataclass
class _Talk:
    """One conversation, or two beside each other when base and adapter are compared."""

    base: LoadedBase
    handle: Handle | None
    system: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    turns: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.turns.clear()

    def answer(self, who: str, prompt: str, *, stream: bool) -> str:
        """The next answer of ``who``: ``base`` answers without the adapter."""
        from addenda.bases.generate import generate

        start = [{"role": "system", "content": _clean(self.system)}] if self.system else []
        turns = self.turns.setdefault(who, start)
        turns.append({"role": "user", "content": _clean(prompt)})

        def write(piece: str) -> None:
            click.echo(piece, nl=False)

        def ask() -> str:
            return generate(
                self.base,
                [turns],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                on_token=write if stream else None,
            )[0]

        if who == "base" and self.handle is not None:
            with self.handle.disabled():
                reply = ask()
        else:
            reply = ask()
        turns.append({"role": "assistant", "content": reply})
        return reply


def _clean(text: str) -> str:
    """The text with a question mark for each byte of the command line that was no character."""
    return text.encode("utf-8", "replace").decode()


@verb(
    "chat",
    examples=[
        "addenda chat",
        "addenda chat --adapter runs/support/adapter",
        'addenda chat --adapter runs/support/adapter --compare --prompt "Where is my parcel?"',
        'addenda chat --prompt "Name three rivers" --temperature 0.7 --json',
    ],
)
@click.option("--adapter", metavar="FOLDER", help="An adapter or run folder; a PEFT folder works too.")
@click.option(
    "--base", metavar="MODEL", help="The model. [default: the adapter's, else smollm2-135m-instruct]"
)
@click.option("--prompt", metavar="TEXT", help="Answer this once and stop.")
@click.option("--compare", is_flag=True, help="Show base and adapted answers side by side.")
@click.option("--system", metavar="TEXT", help="A system message.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the sampling.")
def command(
    console: Console,
    *,
    adapter: str | None,
    base: str | None,
    prompt: str | None,
    compare: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Talk to a model: interactively, or once with --prompt.

    Without --prompt each line of standard input is a turn; /reset forgets the conversation, /exit or Ctrl-D ends it.
    """
    if compare and adapter is None:
        raise ConfigError("--compare needs --adapter", hint="name the adapter to compare with its base")
    if console.json and prompt is None:
        raise ConfigError("--json needs --prompt", hint="an open conversation is no single document")
    with Display(console) as display:
        loaded, handle = _load(adapter, base, display)
    talk = _Talk(loaded, handle, system, max_new_tokens, temperature, seed)
    names = ["base", "adapted"] if compare else ["adapted" if handle else "base"]
    if prompt is not None:
        _once(console, talk, names, prompt)
        return
    console.note(f"{loaded.name}{' with ' + handle.name if handle else ''}; {_HELP}")
    for line in _lines(console):
        if line == "/reset":
            talk.reset()
        else:
            _reply(console, talk, names, line)


def _load(adapter: str | None, base: str | None, display: Display) -> tuple[LoadedBase, Handle | None]:
    from addenda.bases import DEFAULT_BASE
    from addenda.recipe import load_adapted, number_format, prepare_base
    from addenda.settings import BaseSettings

    settings = BaseSettings(base or DEFAULT_BASE)
    dtype = number_format(settings).dtype
    if adapter is None:
        return prepare_base(settings, dtype, display), None
    loaded, handle, _ = load_adapted(adapter, source=base, dtype=dtype, on_event=display)
    return loaded, handle


def _once(console: Console, talk: _Talk, names: list[str], prompt: str) -> None:
    if console.json:
        answers = {name: talk.answer(name, prompt, stream=False) for name in names}
        console.result({"prompt": prompt, "model": talk.base.name, "answers": answers}, "")
    else:
        _reply(console, talk, names, prompt)


def _reply(console: Console, talk: _Talk, names: list[str], prompt: str) -> None:
    if len(names) == 1:
        talk.answer(names[0], prompt, stream=True)
        click.echo()
        return
    one, other = ((name, talk.answer(name, prompt, stream=False)) for name in names)
    console.result({}, side_by_side(one, other))


def _lines(console: Console) -> Iterator[str]:
    """The user's turns; the prompt sign goes to standard error, so that standard output holds answers alone."""
    while True:
        if sys.stdin.isatty():
            click.echo(console.paint("> ", err=True, bold=True), nl=False, err=True, color=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/exit":
            return
        if text:
            yield text
