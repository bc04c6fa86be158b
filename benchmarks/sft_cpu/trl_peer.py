"""TRL's SFTTrainer with PEFT or Unsloth, as its users run it: all defaults but those set below."""

from __future__ import annotations

import argparse
from typing import Any

from clock import StepClock, gpu_memory, memory_now, write_result

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", required=True, help="model folder")
parser.add_argument("--data", required=True, help="jsonl of messages")
parser.add_argument("--work", required=True, help="folder for what the libraries write")
parser.add_argument("--out", required=True, help="where the result goes")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--warmup", type=int, required=True)
parser.add_argument("--steps", type=int, required=True, help="timed steps after the warm-up")
parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True, help="of the base")
parser.add_argument("--packing", action="store_true")
parser.add_argument("--tuned", action="store_true", help="packed, one pack at a time, activations kept")
parser.add_argument("--gpu", action="store_true", help="on the GPU, not on the CPU")
parser.add_argument("--liger", action="store_true", help="with Liger's kernels")
parser.add_argument(
    "--unsloth", action="store_true", help="with Unsloth's model and adapter in place of PEFT's"
)
options = parser.parse_args()

if options.unsloth:  # wants to be imported before all that it changes
    from unsloth import FastLanguageModel

import torch  # noqa: E402

torch.set_num_threads(options.threads)

from datasets import load_dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

clock = StepClock(options.warmup)


class Counted(SFTTrainer):
    """The trainer with a count of the real tokens of a step; it changes nothing."""

    tokens = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        return super().training_step(model, inputs, *args, **kwargs)


class Stopwatch(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        clock.step_done(trainer.tokens)
        trainer.tokens = 0


tuned: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "gradient_checkpointing": False,
}
arguments = SFTConfig(
    output_dir=options.work,
    max_steps=options.warmup + options.steps,
    packing=options.packing or options.tuned,
    # The default, float32 under bfloat16 autocast, is slower and larger than either.
    model_init_kwargs={"dtype": options.dtype},
    **({"bf16": False} if options.dtype == "float32" else {}),
    use_cpu=not options.gpu,
    use_liger_kernel=options.liger,
    report_to="none",
    save_strategy="no",
    **(tuned if options.tuned else {}),
)
dataset = load_dataset("json", data_files=options.data, split="train", cache_dir=options.work)


def contestant() -> dict[str, Any]:
    """The model, and what puts the adapter on it."""
    if not options.unsloth:
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return {"model": options.model, "peft_config": lora}
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model, tokenizer = FastLanguageModel.from_pretrained(
        options.model,
        max_seq_length=arguments.max_length,
        dtype=getattr(torch, options.dtype),
        load_in_4bit=False,
    )
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=32, lora_dropout=0, target_modules=names)
    arguments.model_init_kwargs = None  # the model is there already
    return {"model": model, "processing_class": tokenizer}


trainer = Counted(**contestant(), args=arguments, train_dataset=dataset, callbacks=[Stopwatch()])
memory_before_training = memory_now()
losses = trainer.train()

write_result(
    options.out,
    **clock.measured(),
    trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    dataset_tokens=sum(len(ids) for ids in trainer.train_dataset["input_ids"]),
    loss=round(losses.training_loss, 4),
    memory_before_training_bytes=memory_before_training,
    **gpu_memory(),
    settings={
        "rows_or_packs_at_once": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "max_length": arguments.max_length,
        "packing": arguments.packing,
        "bf16_autocast": arguments.bf16,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "loss_type": arguments.loss_type,
        "assistant_only_loss": arguments.assistant_only_loss,
        "optimizer": str(arguments.optim),
        "attention": trainer.model.config._attn_implementation,
        "weights": str(next(p for p in trainer.model.parameters() if not p.requires_grad).dtype),
        "threads": torch.get_num_threads(),
    },
)
