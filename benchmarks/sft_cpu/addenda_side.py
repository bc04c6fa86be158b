"""Addenda through its public API with its defaults, as ``addenda train`` runs it."""

from __future__ import annotations

import argparse
from pathlib import Path

from clock import StepClock, gpu_memory, memory_now, write_result

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="base model, as for 'addenda train --base'")
parser.add_argument("--data", required=True, help="jsonl of messages")
parser.add_argument("--work", required=True, help="folder for what the run writes")
parser.add_argument("--out", required=True, help="where the result goes")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--warmup", type=int, required=True)
parser.add_argument("--steps", type=int, required=True, help="timed steps after the warm-up")
parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True, help="of the base")
parser.add_argument("--train-on", choices=("assistant", "all"), default="assistant")
parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
parser.add_argument("--packed", metavar="NAME", help="in place of --model, this registered one, kept packed")
parser.add_argument("--micro-batch", type=int, default=None, help="tokens run at once, if not the default")
options = parser.parse_args()

import torch  # noqa: E402

torch.set_num_threads(options.threads)

import addenda  # noqa: E402
from addenda import data, train  # noqa: E402

clock = StepClock(options.warmup)
micro_batches: list[int] = []


def on_event(event: train.Event) -> None:
    if isinstance(event, train.StepEvent):
        clock.step_done(event.tokens)
        losses.append(event.loss)
    if isinstance(event, train.StartEvent):
        micro_batches.append(event.tokens_per_micro_batch)


losses: list[float] = []
base = addenda.load_base(
    options.packed or options.model,
    dtype=getattr(torch, options.dtype),
    device=options.device,
    weights="packed" if options.packed else "auto",
)
handle = addenda.attach(base.model, addenda.LoRA(rank=16), "all-linear")
encoder = data.Encoder(base.tokenizer, base.chat_template, options.train_on, max_tokens=1024, overflow="cut")
examples = data.encode_rows(data.read_dataset(options.data).require_clean().conversations, encoder)
config = train.TrainConfig(
    epochs=1_000_000,  # max_steps ends the run
    max_steps=options.warmup + options.steps,
    tokens_per_micro_batch=options.micro_batch,
    save_every_minutes=None,  # saving is not timed for anyone
)
memory_before_training = memory_now()
train.train(base, handle, examples.examples, [], config, run_dir=Path(options.work), on_event=on_event)

write_result(
    options.out,
    **clock.measured(),
    trainable_parameters=handle.trainable_parameters,
    dataset_tokens=examples.tokens,
    loss=round(sum(losses) / len(losses), 4),
    memory_before_training_bytes=memory_before_training,
    **gpu_memory(),
    settings={
        "rows_per_step": config.batch_size,
        "tokens_per_micro_batch": micro_batches[0],
        "train_on": options.train_on,
        "share_of_tokens_trained": round(examples.trained_tokens / examples.tokens, 3),
        "weights": f"{base.weights} {base.model.dtype}",
        "threads": torch.get_num_threads(),
    },
)
