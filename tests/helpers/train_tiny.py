"""A real training run that takes half a second: a two-layer Llama, LoRA, made-up rows; also run as a script.

The script prints one JSON line for each step, and ends with the exit code the command line would give.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import addenda
from addenda.data.rows import Example, RowRef
from addenda.errors import AddendaError
from addenda.train.config import TrainConfig
from addenda.train.interrupt import Interrupted
from addenda.train.loop import train
from addenda.train.metrics import MetricsLog
from addenda.train.state import adapter_tensors, digest_of_tensors

VOCAB = 96
CONFIG = {
    "epochs": 3, "batch_size": 4, "learning_rate": 5e-3, "tokens_per_micro_batch": 30,
    "save_every_steps": 2, "save_every_minutes": None, "threads": 1, "patience": None,
}  # fmt: skip


def make_base(seed=0, dtype=torch.float32, **changes):
    """A Llama of hidden size 64 and two layers with random weights."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval().to(dtype)
    return SimpleNamespace(model=model)


def make_rows(count, seed=0, file="rows.jsonl"):
    """Rows of 4 to 20 random tokens, of which all but a prompt of random length are trained.

    Each begins with a token of its own, so that a model can know every row by heart.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, size=1):
        return torch.randint(low, high, (size,), generator=generator).tolist()

    rows = []
    for index in range(count):
        [length] = draw(4, 21)
        [prompt] = draw(1, length)
        trained = tuple(place >= prompt for place in range(length))
        ids = (index % VOCAB, *draw(0, VOCAB, length - 1))
        rows.append(Example(ids, trained, RowRef(file, index + 1, index)))
    return rows


def attach(base, **settings):
    return addenda.attach(base.model, addenda.LoRA(**{"rank": 4, "dropout": 0.1, **settings}), seed=3)


def run(folder, *, resume=False, rows=10, heldout=4, config=None, on_event=None, **options):
    """Train from scratch or resume; returns the result and the handle."""
    base = make_base()
    handle = attach(base)
    log = MetricsLog(Path(folder) / "metrics.jsonl")

    def tell(event):
        log(event)
        if on_event is not None:
            on_event(event)

    result = train(
        base,
        handle,
        make_rows(rows),
        make_rows(heldout, seed=1),
        TrainConfig(**{**CONFIG, **(config or {})}),
        run_dir=folder,
        on_event=tell,
        resume=resume,
        **options,
    )
    return result, handle


def digest(handle):
    return digest_of_tensors(adapter_tensors(handle))


def child(folder, *, resume, environment=None, seconds_per_step=0.0):
    """Run in this process and leave the adapter's hash in ``result.json``; for processes that may be killed."""
    os.environ.update(environment or {})
    torch.set_num_threads(1)
    result, handle = run(folder, resume=resume, on_event=lambda event: time.sleep(seconds_per_step))
    Path(folder, "result.json").write_text(json.dumps({"sha256": digest(handle), "best": result.best_step}))


def main():
    warnings.simplefilter("error")
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--await-signal-after", type=int, metavar="STEP")
    parser.add_argument("--seconds-per-evaluation", type=float, default=0.0)
    given = parser.parse_args()

    def tell(event):
        print(json.dumps({"event": type(event).__name__, "step": event.step}), flush=True)
        if type(event).__name__ == "StepEvent" and event.step == given.await_signal_after:
            while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # as it is once a signal has come
                time.sleep(0.01)

    options = {}
    if given.seconds_per_evaluation:

        def evaluate():
            print(json.dumps({"event": "evaluating"}), flush=True)
            time.sleep(given.seconds_per_evaluation)
            return {"nll_per_token": 1.0}

        options["evaluate"] = evaluate
    try:
        _, handle = run(given.folder, resume=given.resume, on_event=tell, **options)
    except Interrupted as stopped:
        print(json.dumps({"event": "Interrupted", "checkpoint": stopped.checkpoint}))
        return stopped.exit_code
    except AddendaError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"event": "done", "sha256": digest(handle)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
