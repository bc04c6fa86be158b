"""llama.cpp, asked in full precision what follows some tokens and how it splits a text."""

from __future__ import annotations

import json
import math
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch


class LlamaCpp:
    """A GGUF file in a server of its own, nothing rounded that need not be."""

    def __init__(self, file: Path, vocabulary: int) -> None:
        xl = pytest.importorskip("xllamacpp", reason="llama.cpp itself is asked: pip install xllamacpp")
        made = xl.CommonParams()
        made.model.path = str(file)
        made.n_ctx, made.n_parallel, made.warmup = 256, 1, False
        made.cpuparams.n_threads = made.cpuparams_batch.n_threads = 1
        # Both are needed: flash attention computes with float16 keys and values whatever they are kept in.
        made.cache_type_k = made.cache_type_v = xl.ggml_type.GGML_TYPE_F32
        made.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.vocabulary, self.server = vocabulary, xl.Server(made)

    def ask(self, route: str, **body: Any) -> Any:
        request = urllib.request.Request(
            self.server.listening_address + route,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        """Of what follows, (vocabulary,). It is made to sample token 5: at an end of text it would tell nothing."""
        answer = self.ask(
            "/completion",
            prompt=tokens,
            n_predict=1,
            n_probs=self.vocabulary,
            logit_bias=[[5, 100.0]],
            seed=1,
        )
        found = torch.full((self.vocabulary,), -math.inf)
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found.log_softmax(0)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        found: list[int] = self.ask("/tokenize", content=text, add_special=special, parse_special=True)[
            "tokens"
        ]
        return found
