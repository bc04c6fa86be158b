"""Word problems (GSM8K) by SmolLM2-135M-Instruct: supervised fine-tuning by the package's own training loop.

Rows are conversations, and the worked answers are what is trained. The rows to train on are drawn anew for each seed;
those that serve for tuning and for the test are always the same, and never trained on.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contenders import Contender
from torch import Tensor, nn

import addenda
from addenda import data, train
from addenda.bases.packed import PackedModel
from addenda.bases.place import move
from addenda.evals.general_kl import general_kl
from addenda.train.batches import packed_batch
from addenda.train.evaluation import heldout_nll
from addenda.train.loss import packed_loss
from addenda.train.memory import peak_memory_bytes

__all__ = ["GSM8K", "gpu_name"]

BASE = "smollm2-135m-instruct"
TEST, VALIDATION = 200, 100
STEPS, BATCH = 32, 5
"""Five rows are about a thousand tokens."""
TOKENS_AT_ONCE = 1024


class GSM8K:
    """The task: what every run of it shares."""

    name = "gsm8k"
    score = "nll"

    def __init__(self, folder: Path, model: Path | None, device: str) -> None:
        self.device = torch.device(device)
        self.device_name = "cpu" if device == "cpu" else gpu_name()
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU; nothing else elsewhere
        self.base = addenda.load_base(str(model or BASE), dtype=torch.float32)
        encoder = data.Encoder(
            self.base.tokenizer, self.base.chat_template, "assistant", max_tokens=512, overflow="drop"
        )
        self.rows = _read(folder / "train.jsonl", encoder)

    def part(self, part: str, seed: int = 0) -> list[data.Example]:
        """Return the rows of a part; those to train on, and their order, are drawn by the seed."""
        if part == "test":
            return self.rows[:TEST]
        if part == "validation":
            return self.rows[TEST : TEST + VALIDATION]
        return random.Random(seed).sample(self.rows[TEST + VALIDATION :], STEPS * BATCH)

    def run(self, contender: Contender, rate: float, seed: int, part: str) -> dict[str, Any]:
        """Train with one rate and seed, and judge on a part; leaves the base changed, so call it in a child."""
        torch.manual_seed(seed)
        move(self.base.model, self.device)  # only now: a process that has used a GPU cannot be forked
        rows, held = self.part("train", seed), self._held()
        started = time.process_time()
        handle = self._attach(contender, rows, seed)
        attached = time.process_time()
        config = train.TrainConfig(
            epochs=1,
            batch_size=BATCH,
            schedule="linear",
            warmup_fraction=0.1,
            learning_rate=rate,
            save_every_minutes=None,
            threads=1,
            seed=seed,
            tokens_per_micro_batch=TOKENS_AT_ONCE,
        )
        with tempfile.TemporaryDirectory() as work:
            done = train.train(
                self.base, handle, rows, [], config, run_dir=Path(work) / "run", on_event=lambda _: None
            )
        trained, peak = time.process_time(), self._held() - held
        found = {
            "cpu_seconds": trained - attached,
            "attach_seconds": attached - started,
            "parameters": handle.trainable_parameters,
            "rows": len(rows),
            "tokens": done.trained_tokens + done.context_tokens,
            "nll": self._nll(part),
            "peak_bytes": peak,
        }
        if part == "test":
            moved = general_kl(self.base, handle)
            with handle.disabled():
                found["base_nll"] = self._nll(part)
            found |= {"kl": moved.mean, "agreement": moved.agreement}
        return found

    def _held(self) -> int:
        """Return the most bytes that this process has held at once so far, on the GPU where it uses one."""
        return peak_memory_bytes()[self.device.type if self.device.type == "cuda" else "rss"]

    def _attach(self, contender: Contender, rows: list[data.Example], seed: int) -> addenda.Handle:
        method, observed = contender.made(), None
        if method.needs() not in (None, "weight"):
            packed, few = PackedModel(self.base.model), rows[: method.rows_to_observe()]
            groups = [few[i : i + BATCH] for i in range(0, len(few), BATCH)]
            batches = [partial(_loss, packed=packed, rows=group) for group in groups]
            observed = addenda.observe(self.base.model, method, contender.targets, batches)
            method = observed.method
        return addenda.attach(self.base.model, method, contender.targets, seed=seed, observed=observed)

    def _nll(self, part: str) -> float:
        """Return the mean over all tokens of the answers, in nats."""
        packed = PackedModel(self.base.model)
        self.base.model.eval()
        return heldout_nll(packed, self.part(part), tokens=TOKENS_AT_ONCE)["nll_per_token"]


def gpu_name() -> str:
    """Return the first GPU's name as the driver tells it, without PyTorch touching it."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def _loss(model: nn.Module, *, packed: PackedModel, rows: Sequence[data.Example]) -> Tensor:
    batch = packed_batch(rows, next(model.parameters()).device)
    hidden = packed.hidden(batch.input_ids, batch.lengths, prompts=batch.prompts)
    return packed_loss(packed, hidden, batch.predict_from, batch.targets, denominator=len(batch.targets))


def _read(path: Path, encoder: data.Encoder) -> list[data.Example]:
    """Return the rows that fit, in an order drawn once for all."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(77).shuffle(lines)
    with tempfile.TemporaryDirectory() as work:
        chats = Path(work) / "chats.jsonl"
        turns = [[("user", line["question"]), ("assistant", line["answer"])] for line in lines]
        chats.write_text(
            "".join(
                json.dumps({"messages": [{"role": role, "content": text} for role, text in pair]}) + "\n"
                for pair in turns
            ),
            encoding="utf-8",
        )
        found = data.read_dataset(str(chats)).require_clean()
        return list(data.encode_rows(found.conversations, encoder).examples)
