"""llama.cpp, as the package xllamacpp carries it, asked over its own server."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import orjson
import torch
from torch import Tensor

from addenda.bases.loaded import vocabulary_of
from addenda.errors import ExportError, MissingDependencyError
from addenda.export.job import Job
from addenda.export.probes import Kind, Row
from addenda.export.runtime import Runtime

__all__ = ["LlamaCpp", "LlamaCppWithAdapter", "require_llama_cpp", "run_in_llama_cpp"]

TOLD = 1024
"""Likeliest tokens whose log-probabilities are asked for at most positions; at the last of each row it is all."""
_FORCED = 100.0
"""Added to the logit of the token that the server is to write, so that it never writes one that ends the answer; the
log-probabilities that it tells are those before."""
_SECONDS, _ATTEMPTS = 600, 4
_ROWS = 4
"""Rows that are asked at once."""


def require_llama_cpp() -> str:
    """Return the name and version of what is installed.

    Raises:
        MissingDependencyError: nothing is.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingDependencyError(
            "llama.cpp is not installed",
            hint="pip install 'addenda[llamacpp]' brings it, as the package xllamacpp",
        )
    return f"llama.cpp (xllamacpp {importlib.metadata.version('xllamacpp')})"


class LlamaCpp(Runtime):
    """A GGUF model and, beside it, GGUF adapters, in a process of their own.

    Args:
        model: the model's file.
        adapters: adapters' files; the first is the one that `answer` switches.
        exact: compute with a float32 cache and without flash attention.
        context: tokens that must fit.
        vocabulary: rows of the trained model's output.
        tools: whether the model's template writes tools.

    Raises:
        MissingDependencyError: llama.cpp is not installed.
        ExportError: it refuses a file; with what it said.
    """

    has_base: ClassVar[bool] = False

    def __init__(
        self,
        model: Path,
        adapters: Sequence[Path] = (),
        *,
        exact: bool,
        context: int,
        vocabulary: int,
        tools: bool = False,
    ) -> None:
        self.name = require_llama_cpp() + (", float32 cache" if exact else "")
        self._vocabulary, self._adapters = vocabulary, list(adapters)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        settings = {
            "model": str(model.absolute()),
            "adapters": [str(path.absolute()) for path in adapters],
            "exact": exact,
            "rows": _ROWS,
            "context": -(-context // 256) * 256 * _ROWS,
            "threads": 1,  # they wait for each other busily, which on a busy machine takes ten times as long
        }
        self._process = _start(settings, self._said)
        self._address = self._await(model)
        self.chat = _Chat(self, tools=tools)
        # Whole letters only: of a token that is half of one the server tells nothing.
        self._letter = self.chat.encode("a")[-1]

    def _await(self, model: Path) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return str(json.loads(line)["address"])
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        said = self.said()
        self._release()
        raise ExportError(
            "llama.cpp refuses the file",
            where={"model": model.name, "it said": _reason(said)},
            hint="a file that was written whole is read: report this with the command that was run",
        )

    def said(self) -> list[str]:
        """Return the lines that llama.cpp printed."""
        self._said.seek(0)
        return self._said.read().decode("utf-8", "replace").splitlines()

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Ask the server; returns its answer.

        Raises:
            ExportError: it is gone, or refuses the request.
        """
        request = urllib.request.Request(
            self._address + path, orjson.dumps(body), {"Content-Type": "application/json"}
        )
        for attempt in range(_ATTEMPTS):
            try:
                with _OPENER.open(request, timeout=_SECONDS) as answer:
                    return orjson.loads(answer.read())
            except OSError as error:
                if attempt + 1 < _ATTEMPTS and self._process.poll() is None:
                    continue  # it hangs up on those who are slow to ask, as on a busy machine
                raise ExportError(
                    "llama.cpp does not answer",
                    where={"asked": path, "error": error, "it said": _reason(self.said())},
                    hint="it may have run out of memory: close other programs, and try again",
                ) from error
        raise AssertionError

    def answers(self, rows: Sequence[Row], kind: Kind, *, adapted: bool = True) -> Iterator[Tensor]:
        # A token at a time reads every weight for each; several rows share that.
        with ThreadPoolExecutor(_ROWS) as pool:
            yield from pool.map(lambda row: self.answer(row, kind, adapted=adapted), rows)

    def answer(self, row: Row, kind: Kind, *, adapted: bool = True) -> Tensor:
        ids = row["input_ids"][0].tolist()
        answers = torch.full((len(ids), self._vocabulary), math.nan)
        for at in range(len(ids)):
            told = self._vocabulary if at == len(ids) - 1 else TOLD
            answers[at] = self.next_token(ids[: at + 1], told, adapted=adapted)
        return answers

    def next_token(self, ids: Sequence[int], told: int, *, adapted: bool = True) -> Tensor:
        """Return the log-probabilities of the token after ``ids``, (vocabulary,), NaN where they are not told."""
        body: dict[str, Any] = {
            "prompt": list(ids),
            "n_predict": 1,
            "n_probs": told,
            "cache_prompt": True,
            "logit_bias": [[self._letter, _FORCED]],
            "samplers": ["top_k"],
            "top_k": 1,
        }
        if self._adapters:  # named always: a request that names none has all of them, added up
            body["lora"] = [{"id": 0, "scale": 1.0 if adapted else 0.0}]
        answer = self.post("/completion", body)
        listed = answer["completion_probabilities"][0]["top_logprobs"]
        found = torch.full((self._vocabulary,), math.nan)
        places = torch.tensor([each["id"] for each in listed])
        # Where it cannot tell a logarithm it writes null.
        values = torch.tensor([-math.inf if each["logprob"] is None else each["logprob"] for each in listed])
        if int(places.max()) >= self._vocabulary:
            return found
        found[places] = values
        # Its probabilities add up to one within 2e-4 only: float32, one after another.
        return found.log_softmax(-1) if told == self._vocabulary == len(listed) else found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._release()

    def _release(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._said.close()


class LlamaCppWithAdapter(LlamaCpp):
    """The same, where the adapter can be switched off."""

    has_base = True


def run_in_llama_cpp(job: Job, model: Path, adapter: Path | None = None, *, exact: bool) -> LlamaCpp:
    """Load the files of an export, with room for what it is asked."""
    assert job.base is not None
    make = LlamaCppWithAdapter if adapter else LlamaCpp
    return make(
        model,
        [adapter] if adapter else [],
        exact=exact,
        context=max(row["input_ids"].shape[1] for row in job.probes.rows) + 8,
        vocabulary=vocabulary_of(job.model),
        tools="tools" in (job.base.chat_template or ""),
    )


class _Chat:
    """The server's own template and tokenizer."""

    def __init__(self, server: LlamaCpp, *, tools: bool) -> None:
        self._server, self.tools = server, tools

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        body = {"messages": list(messages), **({"tools": list(tools)} if tools else {})}
        return str(self._server.post("/apply-template", body)["prompt"])

    def encode(self, text: str) -> list[int]:
        return self._tokens(text, special=False)

    def begin(self, text: str) -> list[int]:
        return self._tokens(text, special=True)

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        body = {"content": text, "add_special": special, "parse_special": True}
        return list(self._server.post("/tokenize", body)["tokens"])

    def ends(self, token: int) -> bool:
        body = {
            "prompt": [token],
            "n_predict": 2,
            "logit_bias": [[token, _FORCED]],
            "samplers": ["top_k"],
            "top_k": 1,
        }
        return bool(self._server.post("/completion", body)["stop_type"] == "eos")


_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy in the environment is not for our own child."""


def _start(settings: Mapping[str, Any], said: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "addenda.export.runtimes.llama_server", json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=said,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path if p)},
        start_new_session=True,  # Ctrl-C is for this process to handle
    )


def _reason(said: Sequence[str]) -> str:
    """The last line with an error, without the time in front."""
    wrong = [line for line in said if " E " in line or "error" in line.lower() or "failed" in line.lower()]
    return " | ".join(line.strip() for line in (wrong[:3] or list(said)[-1:])) or "nothing"
