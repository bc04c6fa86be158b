"""What the PEFT border writes, and every folder it refuses to read, with the model left as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import addenda
from addenda.core.handle import handles
from addenda.errors import AddendaError, CheckpointError, ConfigError, ExportError, NotFoundError, UnsafeError
from addenda.export.peft import CONFIG, TENSORS, import_peft, write_peft

Edit = Callable[[dict[str, Any]], object]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 6)
        self.v_proj = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv((self.q_proj(x) + self.v_proj(x))[..., None])


def make_model() -> nn.Module:
    return nn.Sequential(Block())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound PEFT folder for ``make_model``."""
    handle = addenda.attach(make_model(), addenda.LoRA(rank=2), targets=["q_proj", "v_proj"])
    write_peft(handle, tmp_path)
    return tmp_path


def change_config(folder: Path, edit: Edit) -> None:
    config = json.loads((folder / CONFIG).read_text())
    edit(config)
    (folder / CONFIG).write_text(json.dumps(config))


def change_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)


def assert_refused(folder: Path, kind: type[AddendaError], text: str) -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(kind, match=text):
        import_peft(model, folder)
    assert not handles(model)
    assert type(model[0].q_proj) is nn.Linear
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_sound_folder_is_read(folder: Path) -> None:
    model = make_model()
    handle = import_peft(model, folder, name="theirs")
    assert (handle.name, handle.paths) == ("theirs", ["0.q_proj", "0.v_proj"])


@pytest.mark.parametrize(
    ("kind", "text", "edit"),
    [
        (UnsafeError, "regular expression", lambda c: c.update(target_modules=".*(q|v)_proj")),
        (UnsafeError, "regular expression", lambda c: c.update(target_modules=["(a+)+$"])),
        (UnsafeError, "regular expression", lambda c: c.update(rank_pattern={"^q_proj": 4})),
        (UnsafeError, "regular expression", lambda c: c.update(alpha_pattern={"q|v": 4})),
        (CheckpointError, "peft_type 'NONE'", lambda c: c.update(peft_type="NONE")),
        (CheckpointError, "peft_type None", lambda c: c.pop("peft_type")),
        (CheckpointError, "lora_magnitude_vector", lambda c: c.update(use_dora=True)),
        (CheckpointError, "modules_to_save", lambda c: c.update(modules_to_save=["lm_head"])),
        (CheckpointError, "bias", lambda c: c.update(bias="all")),
        (CheckpointError, "some_later_key = 3", lambda c: c.update(some_later_key=3)),
        (CheckpointError, "layer_replication", lambda c: c.update(layer_replication=[[0, 4]])),
        (CheckpointError, "pissa", lambda c: c.update(init_lora_weights="pissa_niter_4")),
        (CheckpointError, "are no target of this model", lambda c: c.update(target_modules=["q_proj"])),
        (CheckpointError, "have no tensors", lambda c: c.update(target_modules=["q_proj", "v_proj", "conv"])),
        (CheckpointError, "shape", lambda c: c.update(r=3)),
        (CheckpointError, "shape", lambda c: c.update(rank_pattern={"v_proj": 1})),
        (AddendaError, "rank", lambda c: c.update(r=200_000)),
        (ConfigError, "rank", lambda c: c.update(r="many")),
        (ConfigError, "alpha", lambda c: c.update(lora_alpha=-1)),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    folder: Path, kind: type[AddendaError], text: str, edit: Edit
) -> None:
    change_config(folder, edit)
    assert_refused(folder, kind, text)


def rename(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


Q_A = "base_model.model.0.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("is missing", lambda t: t.pop(Q_A)),
        ("belong to nothing", lambda t: t.update({"../../etc/passwd": torch.zeros(2)})),
        ("belong to nothing", rename(Q_A, "base_model.model.0.q_proj.lora_A.default.bias")),
        ("no target of this model", rename(Q_A, "base_model.model.7.q_proj.lora_A.weight")),
        ("no finite numbers", lambda t: t[Q_A].fill_(float("nan"))),
        ("no finite numbers", lambda t: t.update({Q_A: torch.zeros(2, 8, dtype=torch.int8)})),
        ("shape", lambda t: t.update({Q_A: torch.zeros(2, 9)})),
        ("no tensor", lambda t: t.clear()),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder: Path, text: str, edit: Edit) -> None:
    change_tensors(folder, edit)
    assert_refused(folder, AddendaError, text)


def test_pickled_weights_are_refused_unopened(folder: Path) -> None:
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04would run code")
    assert_refused(folder, UnsafeError, "unpickling runs code")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, NotFoundError, name)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "{}" + " " * 2**20])
def test_a_broken_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    assert_refused(folder, CheckpointError, CONFIG)


def test_a_cut_off_tensor_file_is_refused(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(whole[: len(whole) // 2])
    assert_refused(folder, CheckpointError, "is damaged")


@pytest.mark.parametrize(
    ("method", "targets", "text"),
    [
        (addenda.Bottleneck(), ["q_proj"], "PEFT has no bottleneck adapters"),
        (addenda.BitFit(), ["q_proj"], "PEFT has no such method"),
        (addenda.VeRA(rank=2), ["conv"], "has no form for 1 of the adapted layers"),
    ],
)
def test_what_peft_has_no_form_for_is_not_written(
    method: addenda.Method, targets: list[str], text: str, tmp_path: Path
) -> None:
    handle = addenda.attach(make_model(), method, targets=targets)
    with pytest.raises(ExportError, match=text) as caught:
        write_peft(handle, tmp_path)
    assert caught.value.hint
    assert not list(tmp_path.iterdir())
