"""Adapters train in the loops of others, with nothing said to these: transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import addenda
from addenda.core import Method, registry
from addenda.core.mixing import Mixture

pytest.importorskip("accelerate")

FAMILIES = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "oft": {"block_size": 8},
    "bottleneck": {"size": 4},
    "reft": {"rank": 4},
    "prompt-tuning": {"tokens": 4},
}
"""One method of each family: a low-rank one, one that goes by the weight, a rotation, and so on."""
SHARING = {"vera": {"rank": 8}}
"""One whose layers share tensors."""
SOME = {**FAMILIES, **SHARING}
MIXTURES = {name for name in registry.names() if issubclass(registry.get(name), Mixture)}
"""They need other adapters on the model first."""
ALL = {name: registry.get(name).variants[0] for name in registry.names() if name not in MIXTURES}
STEPS = 6
HERE = Path(__file__).parent


def method_of(name: str) -> Method:
    return registry.get(name).from_settings(SOME.get(name, ALL.get(name)))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture
def base(seeded: int) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=67, num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, **sizes
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def rows() -> list[dict[str, list[int]]]:
    ids = torch.randint(67, (8, 12)).tolist()
    return [{"input_ids": each, "labels": each} for each in ids]


def trainer_of(
    model: nn.Module, rows: list[dict[str, list[int]]], folder: Path, **changes: object
) -> transformers.Trainer:
    settings = {
        "max_steps": STEPS, "learning_rate": 0.01, "per_device_train_batch_size": 4, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **changes})
    return transformers.Trainer(model, arguments, train_dataset=rows)


def digests(model: nn.Module) -> dict[str, str]:
    """The bytes of each tensor that belongs to the base."""
    return {
        name: hashlib.sha256(tensor.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
        if ".adapters." not in name
    }


def values(handle: addenda.Handle) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in handle.tensors().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loss_of(model: nn.Module, rows: list[dict[str, list[int]]]) -> float:
    ids = torch.tensor([row["input_ids"] for row in rows])
    with torch.no_grad():
        return float(model.eval()(ids, labels=ids).loss)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_while_the_base_keeps_every_byte(
    name: str, base: nn.Module, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    frozen, twin = digests(base), copy.deepcopy(base)
    handle = addenda.attach(base, method_of(name))
    loss, start = loss_of(base, rows), {n: p.detach().clone() for n, p in handle.named_parameters()}
    trainer_of(base, rows, tmp_path / "run", num_train_epochs=10, max_steps=-1).train()
    assert loss_of(base, rows) < loss - 0.1
    assert digests(base) == frozen
    assert [n for n, p in handle.named_parameters() if torch.equal(p, start[n])] == []
    addenda.save(base, tmp_path / "adapter")
    addenda.load(twin, tmp_path / "adapter")
    assert loss_of(twin, rows) == loss_of(base, rows)


RESUMED = [pytest.param(n, marks=[] if n in SOME else [pytest.mark.slow]) for n in ALL]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(
    name: str, base: nn.Module, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    found = []
    for place in (None, str(tmp_path / f"checkpoint-{STEPS // 2}")):
        model = copy.deepcopy(base)
        handle = addenda.attach(model, method_of(name))
        start = values(handle)
        saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
        trainer_of(model, rows, tmp_path, **saving).train(resume_from_checkpoint=place)
        found.append(values(handle))
        assert not same(found[-1], start)
    assert same(*found)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_recomputed_activations_give_the_same_adapter(
    name: str, reentrant: bool, base: nn.Module, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    found, calls = [], []
    recomputing = {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    for settings in ({}, recomputing):
        model = copy.deepcopy(base)
        handle = addenda.attach(model, method_of(name))
        ran = []
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        trainer_of(model, rows, tmp_path, **settings).train()
        found.append(values(handle))
        calls.append(len(ran))
    assert same(*found)
    assert calls == [STEPS, 2 * STEPS]


EVERY_DAY = (("lora", "aot_eager"), ("prompt-tuning", "aot_eager"))
COMPILED = [
    pytest.param(*pair, marks=[] if pair in EVERY_DAY else [pytest.mark.slow])
    for pair in [*((name, "aot_eager") for name in SOME), ("lora", "inductor")]
]


# PyTorch's own compiler loads what PyTorch has given up.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("name", "backend"), COMPILED)
def test_compiled_it_trains_to_the_same_adapter(
    name: str, backend: str, base: nn.Module, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    found = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": backend}):
        model = copy.deepcopy(base)
        handle = addenda.attach(model, method_of(name))
        trainer_of(model, rows, tmp_path, **settings).train()
        found.append(values(handle))
    torch._dynamo.reset()
    for key, wanted in found[0].items():
        torch.testing.assert_close(found[1][key], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_training_a_copy_leaves_the_original(
    name: str, base: nn.Module, rows: list[dict[str, list[int]]], tmp_path: Path
) -> None:
    handle = addenda.attach(base, method_of(name))
    before, loss = values(handle), loss_of(base, rows)
    twin = copy.deepcopy(base)
    trainer_of(twin, rows, tmp_path).train()
    assert same(values(handle), before)
    assert loss_of(base, rows) == loss
    assert loss_of(twin, rows) < loss


# TRL recomputes activations unless told otherwise, by a name that transformers has changed.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", FAMILIES)
def test_it_learns_in_trl_too(name: str, tiny_model: Path, chat_rows: Path, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    frozen = digests(model)
    handle = addenda.attach(model, method_of(name))
    start = values(handle)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(
            str(tmp_path), max_steps=STEPS, learning_rate=0.02, per_device_train_batch_size=4, use_cpu=True,
            bf16=False, max_length=96, report_to=[], logging_steps=1, save_steps=STEPS, disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list([json.loads(line) for line in chat_rows.read_text().splitlines()]),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_model),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert digests(model) == frozen
    trained = values(handle)
    assert [n for n, _ in handle.named_parameters() if torch.equal(trained[n], start[n])] == []
    addenda.save(model, tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    assert same(values(addenda.load(again, tmp_path / "adapter")), trained)


@pytest.fixture(scope="module")
def shared() -> Iterator[ModuleType]:
    """The script of which each process runs a function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *sys.path]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(str(HERE))
        yield importlib.import_module("in_two_processes")


@pytest.fixture(scope="module")
def together(shared: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which two processes have written what they found, of all methods."""
    folder = tmp_path_factory.mktemp("two")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([shared.__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=shared.process, args=(rank, 2, port, folder, SOME)) for rank in range(2)
    ]
    for each in processes:
        each.start()
    for each in processes:
        each.join(120)
    assert [each.exitcode for each in processes] == [0, 0]
    return folder


@pytest.mark.parametrize("name", SOME)
def test_two_processes_find_the_gradients_and_the_adapter_of_one(
    name: str, shared: ModuleType, together: Path, tmp_path: Path
) -> None:
    alone = {**shared.gradients(name, SOME[name]), **shared.trained(name, SOME[name], tmp_path)}
    found = load_file(together / f"{name}.safetensors")
    assert alone.keys() == found.keys()
    for key, wanted in alone.items():
        assert key.startswith("trained") or wanted.abs().sum() > 0
        torch.testing.assert_close(found[key], wanted, rtol=1e-4, atol=1e-6)
