"""What is left of an adapter in a low-bit file, merged in several ways or trained through the format?

    python benchmarks/through/run.py --data FOLDER --adapters FOLDER

The data folder holds train.csv: text, category. Each line of ``results/runs.jsonl`` is one model, judged on rows that
nothing was trained on; what is there is not measured again. ``table.py`` makes the README's tables, ``cost.py`` times
the steps.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import addenda
from addenda import kernels
from addenda.bases.packed import PackedModel
from addenda.bases.packed_layers import packed_layers
from addenda.core.through import merged_rows
from addenda.export.careful import MergedLayer, answering_as, careful_merge, kept_wide, mean_kl, plain_merge
from addenda.train.evaluation import training_mode

HERE = Path(__file__).resolve().parent
SEEDS = (1, 2, 3)
TEST, CALIBRATION, TRAIN, BATCH = 256, 64, 1280, 16
RANK = 16
RATES = (1e-3, 4e-3)
"""The usual one, and a higher one: through the format that a base came in, a weight has to move half a step."""
FORMATS = ("Q4_0", "Q4_1", "Q8_0")
THROUGH = (*((kind, rate) for rate in reversed(RATES) for kind in ("Q4_1", "Q4_0")), ("Q8_0", RATES[0]))
"""A format of eight bits is so fine that the usual rate will do."""
WIDER = 0.1
"""Share of the file by which it may grow for layers that are kept at Q8_0."""
VERSIONS = {name: importlib.metadata.version(name) for name in ("addenda", "torch", "transformers")}

Row = tuple[list[int], int]
"""Token ids, and how many of them are the question."""


class Task:
    """Intents of bank customers, named in words by a language model; the rows trained on are drawn by the seed."""

    def __init__(self, folder: Path) -> None:
        self.base = addenda.load_base("smollm2-135m-instruct", weights="packed", dtype=torch.float32)
        self.packed = PackedModel(self.base.model)
        with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
            rows = [(row["text"].strip(), row["category"].replace("_", " ")) for row in csv.DictReader(file)]
        random.Random(0).shuffle(rows)
        self.test, self.rest = self._encoded(rows[:TEST]), self._encoded(rows[TEST:])

    def _encoded(self, rows: Sequence[tuple[str, str]]) -> list[Row]:
        encode, end = self.base.tokenizer.encode, self.base.tokenizer.eos_token_id
        found = []
        for text, category in rows:
            question = encode(f"Message of a bank's customer: {text}\nTopic:")
            found.append(([*question, *encode(f" {category}"), end], len(question)))
        return found

    def drawn(self, seed: int) -> tuple[list[Row], list[Row]]:
        """Return the rows to train on, in their order, and others to calibrate a merge by."""
        rows = random.Random(seed).sample(self.rest, TRAIN + CALIBRATION)
        return rows[:TRAIN], rows[TRAIN:]

    def answers(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, list[int]]:
        """Return logits (n, vocabulary) and targets (n,) at the answers' tokens, and how many each row has."""
        ids = torch.tensor([token for row, _ in rows for token in row])
        lengths, starts = [len(row) for row, _ in rows], [start for _, start in rows]
        first, places = 0, []
        for length, start in zip(lengths, starts, strict=True):
            places += range(first + start, first + length)
            first += length
        hidden = self.packed.hidden(ids, lengths)
        where = torch.tensor(places)
        return (
            self.packed.logits(hidden[where - 1]),
            ids[where],
            [n - s for n, s in zip(lengths, starts, strict=True)],
        )


def judged(task: Task, rows: Sequence[Row]) -> tuple[dict[str, float], list[Tensor]]:
    """Return the figures of the model as it answers now, and its logits."""
    nll, count, exact, kept = 0.0, 0, 0, []
    with torch.no_grad():
        for start in range(0, len(rows), 32):
            logits, targets, sizes = task.answers(rows[start : start + 32])
            nll += float(F.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
            right = (logits.argmax(-1) == targets).split(sizes)
            exact += sum(bool(each.all()) for each in right)  # what greedy decoding would answer
            kept.append(logits)
    return {"nll": nll / count, "exact": exact / len(rows)}, kept


def train(task: Task, handle: addenda.Handle, rows: Sequence[Row], rate: float) -> list[float]:
    """Train for one pass with AdamW and a linear fall of the rate; return the loss of every step."""
    parameters = list(handle.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps, losses = len(rows) // BATCH, []
    with training_mode(task.base.model, handle):
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 6, 1 - step / steps)
            logits, targets, _ = task.answers(rows[step * BATCH : (step + 1) * BATCH])
            loss = F.cross_entropy(logits, targets)
            losses.append(float(loss.detach()))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return losses


def file_bytes(task: Task, merged: Mapping[str, MergedLayer]) -> int:
    """Return the bytes of all weights as a file holds them."""
    layers = packed_layers(task.base.model)
    tied = {layer.raw.data_ptr(): layer.raw.numel() for path, layer in layers.items() if path not in merged}
    norms = sum(p.nbytes for name, p in task.base.model.named_parameters() if ".adapters." not in name)
    return sum(tied.values()) + norms + sum(layer.rows.numel() for layer in merged.values())


class Runs:
    """The lines of the results; each is written as soon as it is known."""

    def __init__(self) -> None:
        self.path = HERE / "results" / "runs.jsonl"
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.done = {(run["seed"], run["name"]) for run in map(json.loads, lines)}

    def add(self, seed: int, name: str, **figures: Any) -> None:
        line = {
            "seed": seed,
            "name": name,
            **figures,
            "date": datetime.date.today().isoformat(),
            "versions": VERSIONS,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print({key: value for key, value in line.items() if key not in ("losses", "versions")}, flush=True)


def compare(
    task: Task,
    runs: Runs,
    seed: int,
    name: str,
    handle: addenda.Handle,
    merged: Mapping[str, MergedLayer],
    wanted: list[Tensor],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Judge one merge, and its distance from the model it was made from."""
    if (seed, name) in runs.done:
        return
    with answering_as(handle, merged):
        figures, logits = judged(task, task.test)
    formats = sorted({layer.format for layer in merged.values()})
    runs.add(
        seed,
        name,
        **figures,
        kl=mean_kl(logits, wanted),
        bytes=file_bytes(task, merged),
        formats=formats,
        **(facts or {}),
    )


def trained(
    task: Task, kept: Path, seed: int, kind: str | None, rate: float
) -> tuple[addenda.Handle, dict[str, Any]]:
    """Return an adapter trained through a format or beside the weights: the one in the folder, where it is there."""
    folder = kept / f"{kind or 'unmerged'}-{rate:g}-{seed}"
    if folder.exists():
        facts = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["provenance"]
        return addenda.load(task.base.model, folder), facts
    handle = addenda.attach(task.base.model, addenda.LoRA(rank=RANK), seed=seed, through=kind)
    started = time.process_time()
    losses = train(task, handle, task.drawn(seed)[0], rate)
    facts = {"rate": rate, "losses": losses, "cpu_seconds": time.process_time() - started}
    addenda.save(task.base.model, folder, provenance=facts)
    return handle, facts


def besides(task: Task, runs: Runs, kept: Path, seed: int) -> None:
    """Train beside the weights as they are, then merge in every way."""
    _, calibration = task.drawn(seed)
    handle, facts = trained(task, kept, seed, None, RATES[0])
    adapted, wanted = judged(task, task.test)
    size = file_bytes(task, {})
    if (seed, "base") not in runs.done:
        with handle.disabled():
            figures, bare = judged(task, task.test)
        runs.add(seed, "base", **figures, kl=mean_kl(bare, wanted), bytes=size)
    more = sum(p.nbytes for p in handle.parameters())
    if (seed, "unmerged") not in runs.done:
        runs.add(seed, "unmerged", **adapted, kl=0.0, bytes=size + more, **facts)
    for kind in FORMATS:
        compare(task, runs, seed, f"{kind} plain", handle, plain_merge(handle, kind), wanted)
        if kind == "Q8_0" or (seed, f"{kind} careful") in runs.done:
            continue  # plain rounding to eight bits leaves next to nothing to make up for
        careful = careful_merge(handle, kind, batches_of(task, calibration))
        compare(task, runs, seed, f"{kind} careful", handle, careful, wanted)
    searched(task, runs, seed, handle, wanted)
    handle.detach()


def batches_of(task: Task, rows: Sequence[Row]) -> list[Callable[[Any], Tensor]]:
    """Return calibration rows as what runs the model on them, a few at a time."""
    return [lambda _, part=rows[i : i + 16]: task.answers(part)[0] for i in range(0, len(rows), 16)]


def mixed(task: Task, runs: Runs, kept: Path, seed: int, kind: str) -> None:
    """Merge carefully, and keep the layers that gain most for a byte at Q8_0."""
    _, calibration = task.drawn(seed)
    handle, _ = trained(task, kept, seed, None, RATES[0])
    _, wanted = judged(task, task.test)
    few = calibration[:12]
    with torch.no_grad():
        held = task.answers(few)[0]
        careful = careful_merge(handle, kind, batches_of(task, calibration))
        chosen = kept_wide(
            handle,
            careful,
            lambda: mean_kl([task.answers(few)[0]], [held]),
            int(WIDER * file_bytes(task, {})),
        )
    compare(task, runs, seed, f"{kind} careful, some Q8_0", handle, chosen, wanted)
    handle.detach()


def searched(task: Task, runs: Runs, seed: int, handle: addenda.Handle, wanted: list[Tensor]) -> None:
    """Q4_K where rows are whole blocks of 256, Q8_0 elsewhere."""
    wide = plain_merge(handle, "Q8_0")
    narrow = {
        path: MergedLayer("Q4_K", merged_rows(handle, path, "Q4_K"), layer.bias)
        if handle.view(path).d_in % 256 == 0
        else layer
        for path, layer in wide.items()
    }
    compare(task, runs, seed, "Q4_K and Q8_0 plain", handle, narrow, wanted)


def unmerged(task: Task, runs: Runs, kept: Path, seed: int, rate: float) -> None:
    """Train beside the weights with another rate."""
    handle, facts = trained(task, kept, seed, None, rate)
    figures, _ = judged(task, task.test)
    size = file_bytes(task, {}) + sum(p.nbytes for p in handle.parameters())
    runs.add(seed, f"unmerged, rate {rate:g}", **figures, kl=0.0, bytes=size, **facts)
    handle.detach()


def through(task: Task, runs: Runs, kept: Path, seed: int, kind: str, rate: float) -> None:
    """Train through a format, and merge into it."""
    handle, facts = trained(task, kept, seed, kind, rate)
    _, wanted = judged(task, task.test)
    compare(
        task, runs, seed, f"{kind} through, rate {rate:g}", handle, plain_merge(handle, kind), wanted, facts
    )
    handle.detach()


def main() -> None:
    """Measure what is not measured yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of Banking77")
    parser.add_argument("--adapters", type=Path, required=True, help="folder where trained adapters are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="these, instead of all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kernels.enable()
    task, runs = Task(options.data), Runs()
    for seed in options.seeds:
        if not {(seed, "Q4_K and Q8_0 plain"), (seed, "Q4_1 careful")} <= runs.done:
            besides(task, runs, options.adapters, seed)
    for kind, rate in THROUGH:
        for seed in options.seeds:
            if (seed, f"{kind} through, rate {rate:g}") not in runs.done:
                through(task, runs, options.adapters, seed, kind, rate)
    for seed in options.seeds:
        if (seed, f"unmerged, rate {RATES[1]:g}") not in runs.done:
            unmerged(task, runs, options.adapters, seed, RATES[1])
    for seed in options.seeds:
        if (seed, "Q4_0 careful, some Q8_0") not in runs.done:
            mixed(task, runs, options.adapters, seed, "Q4_0")


if __name__ == "__main__":
    main()
