"""Compiling and rendering a chat template, in a child process that is started once and used for every rendering.

A template comes with a model, so it is a stranger's program. Jinja's sandbox keeps it from reaching Python, but 19
characters of it can take all memory (``{{ 'a' * 2000000000 }}``), and two loops all time. The child has little of
both; when it takes more, it is gone, and the caller has an error.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from addenda.errors import UnsafeError

__all__ = ["TemplateRefusal", "compile_template", "render"]

_LIMITS = {
    "time": "more than a second of processor time",
    "memory": "more than 512 MiB of memory",
    "text": "more text than any conversation needs",
}
_TIMED_OUT = -getattr(signal, "SIGPROF", signal.SIGTERM)
_WALL_SECONDS = 10.0
"""Where the system has no clock of processor time, a rendering may take so long."""


class TemplateRefusal(Exception):
    """The template, or Jinja, raised an error; its text is what was said."""


def compile_template(source: str) -> None:
    """Raise unless a template can be compiled.

    Raises:
        TemplateRefusal: it is not valid Jinja.
        UnsafeError: compiling it takes too much time or memory.
    """
    _CHILD.ask({"template": source})


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    special_tokens: Mapping[str, Any],
) -> str:
    """Render messages as ``apply_chat_template`` of transformers does.

    Args:
        source: the template's Jinja text.
        messages: ``{"role": ..., "content": ...}`` mappings.
        tools: tool descriptions for templates that take them.
        add_generation_prompt: end with the opening of the assistant's turn.
        special_tokens: the tokenizer's ``special_tokens_map``, which templates write by name.

    Raises:
        TemplateRefusal: the template refuses these messages.
        UnsafeError: rendering takes too much time, memory or text.

    Example:
        >>> render("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
        ...        [{"role": "user", "content": "Hi."}], special_tokens={"eos_token": "</s>"})
        'user: Hi.</s>'
    """
    if not messages:
        raise TemplateRefusal("there are no messages")
    variables = {
        **special_tokens,
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    return _CHILD.ask({"template": source, "messages": messages, "variables": variables})


class _Child:
    """The child process, started when it is first needed and again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: Mapping[str, Any]) -> str:
        """Send a request; return the text of its answer."""
        line = json.dumps(request, default=_plain).encode() + b"\n"
        with self._lock:
            data, status = self._exchange(line)
        found: dict[str, str] = json.loads(data) if data else {}
        if "refused" in found:
            raise TemplateRefusal(found["refused"])
        if "text" not in found:
            raise _over(status, found, request["template"])
        return found["text"]

    def _exchange(self, line: bytes) -> tuple[bytes, int | None]:
        """The answer's line, or nothing and the exit status of a child that is gone."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with _clock(process):
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.write(line)
                    process.stdin.flush()
                data = process.stdout.readline()
        except (
            BaseException
        ):  # Ctrl-C: an answer still in the pipe would be taken for that of the next request
            self.close()
            raise
        return (data, None) if data else (b"", self.close())

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork the child belongs to the other process, which reads the same pipes.
        if self._process is None or self._owner != os.getpid():
            self._process, self._owner = _start(), os.getpid()
        return self._process

    def close(self) -> int | None:
        """End the process; return its exit status."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close() if pipe else None
        try:
            return process.wait(timeout=1)  # without input it ends by itself
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


_CHILD = _Child()
atexit.register(_CHILD.close)


def _start() -> subprocess.Popen[bytes]:
    paths = [str(Path(path).absolute()) for path in sys.path if path]
    return subprocess.Popen(
        # -P: the folder of the file is not where modules are looked for.
        [sys.executable, "-P", str(Path(__file__).with_name("child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"},
        start_new_session=True,  # Ctrl-C is for this process to handle
    )


@contextlib.contextmanager
def _clock(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Where processor time cannot be bounded (Windows), end the process by the wall clock."""
    if hasattr(signal, "setitimer"):
        yield
        return
    timer = threading.Timer(_WALL_SECONDS, process.kill)
    timer.start()
    yield
    timer.cancel()


def _over(status: int | None, found: Mapping[str, Any], source: str) -> UnsafeError:
    """The error of a template that met a limit, or took its process down."""
    ended = "time" if status == _TIMED_OUT else "memory"
    digest = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
    return UnsafeError(
        f"the chat template takes {_LIMITS[found.get('over', ended)]}",
        where={"template sha256": digest, "its beginning": source[:60]},
        hint="no sound template does: take the model from its maker, or give it another chat template",
    )


def _plain(value: object) -> object:
    """A mapping as a dict; anything else JSON has no word for by the name of its type, as transformers shows it."""
    return dict(value) if isinstance(value, Mapping) else f"<{type(value).__name__}>"
