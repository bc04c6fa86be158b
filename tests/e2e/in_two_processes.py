"""What one process, and each of several under other people's data parallelism, does with an adapter."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import addenda
from addenda.core import registry

Settings = dict[str, object]


def base() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=67, num_key_value_heads=2, initializer_range=0.2, **sizes)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def attached(name: str, settings: Settings) -> tuple[nn.Module, addenda.Handle]:
    model = base()
    return model, addenda.attach(model, registry.get(name).from_settings(settings), seed=2)


def rows() -> Tensor:
    return torch.randint(67, (8, 12), generator=torch.Generator().manual_seed(1))


def gradients(name: str, settings: Settings, rank: int = 0, processes: int = 1) -> dict[str, Tensor]:
    """Those of the mean loss over all rows, of which each process has its share."""
    model, handle = attached(name, settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped = DistributedDataParallel(model) if processes > 1 else model
    share = rows().view(processes, -1, 12)[rank]
    wrapped(input_ids=share, labels=share).loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)
    return {f"grad.{name}": p.grad for name, p in handle.named_parameters()}


def trained(name: str, settings: Settings, folder: Path, processes: int = 1) -> dict[str, Tensor]:
    """The adapter after steps of transformers' Trainer, on as many rows each whatever the number of processes."""
    model, handle = attached(name, settings)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, learning_rate=0.01, per_device_train_batch_size=4 // processes, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", optim="sgd", max_grad_norm=0.0,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows().tolist()]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    return {f"trained.{name}": p.detach() for name, p in handle.named_parameters()}


def process(rank: int, processes: int, port: int, folder: Path, methods: dict[str, Settings]) -> None:
    """Be one of several; the first leaves ``<method>.safetensors`` for each method."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}})
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for name, settings in methods.items():
        found = {**gradients(name, settings, rank, processes), **trained(name, settings, folder, processes)}
        if rank == 0:
            save_file(
                {key: value.contiguous() for key, value in found.items()}, folder / f"{name}.safetensors"
            )
    torch.distributed.destroy_process_group()
