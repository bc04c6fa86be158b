"""The child process that runs chat templates; started as a file, it imports nothing but Jinja.

Each line of standard input is one request, each line of standard output its answer, both JSON. A request that takes
too much processor time ends the process; one that takes too much memory is answered so. The environment is the one
transformers renders in; a test holds that the texts are equal byte for byte.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import signal
import sys
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.sandbox

try:
    import resource
except ImportError:  # Windows: the parent's clock is the only limit there
    resource = None  # type: ignore[assignment]

__all__ = ["MEMORY", "SECONDS", "answer"]

SECONDS = 1.0
"""Processor time for one rendering, and once more for each MiB of the request."""
MEMORY = 512 * 2**20
"""Address space of the process, in bytes."""
_MEBIBYTE = 2**20
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Generation(jinja2.ext.Extension):
    """The tag some templates put around trained text: it leaves the text as it is."""

    tags = {"generation"}  # noqa: RUF012 - the name and kind are Jinja's

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` as templates may use it: a call, no class to reach out from."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """A namespace that keeps no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a namespace may hold the name 'self'
        names = dict(*args[1:], **kwargs)
        for name in names:
            _require_plain(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: Any, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no name with an underscore: {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: Any = False, indent: Any = None, separators: Any = None, sort_keys: Any = False
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise, strftime_now=_now, dict=_Dict(), namespace=_Namespace)
    return environment.from_string(source)


def _message(fields: dict[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it on: without nulls, its reasoning under every name it goes by."""
    fields = {key: value for key, value in fields.items() if value is not None}
    reasoning = next((fields[key] for key in _REASONING if key in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


def answer(request: dict[str, Any], limit: int) -> dict[str, str]:
    """Compile a template and, where there are messages, render them.

    Returns:
        ``text``; or ``refused``, what the template or Jinja says; or ``over``, which limit was met.
    """
    try:
        template, text = _compiled(request["template"]), ""
        if "messages" in request:
            messages = [_message(message) for message in request["messages"]]
            text = template.render(**{**request["variables"], "messages": messages})
    except MemoryError:
        return {"over": "memory"}
    except Exception as error:  # noqa: BLE001 - a template is a program: it may raise anything
        return {"refused": str(error) or type(error).__name__}
    return {"text": text} if len(text) <= limit else {"over": "text"}


@contextlib.contextmanager
def _timed(seconds: float) -> Any:
    """End the process by a signal once it has used so much processor time."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _confine() -> None:
    """Bound the memory; let no file be written."""
    if resource is None:
        return
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError, OSError):  # where a lower limit holds already
            resource.setrlimit(kind, (most, most))


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    _confine()
    for line in requests:
        with _timed(SECONDS * (1 + len(line) / _MEBIBYTE)):
            found = answer(json.loads(line), limit=_MEBIBYTE + 16 * len(line))
            try:
                data = json.dumps(found).encode()
            except MemoryError:
                data = b'{"over": "memory"}'
        answers.write(data + b"\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
