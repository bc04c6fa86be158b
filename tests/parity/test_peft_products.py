"""Methods with PEFT forms on layers that the tiny language models of the round trip lack: convolutions, biases."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from addenda import attach
from addenda.core import registry
from addenda.errors import CheckpointError, ExportError
from addenda.export.peft import import_peft, write_peft

peft = pytest.importorskip("peft")

# PEFT merges no BEFT into such a layer.
pytestmark = pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias term")

LAYERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "linear": lambda: (nn.Linear(24, 20), torch.randn(3, 24)),
    "linear-no-bias": lambda: (nn.Linear(24, 20, bias=False), torch.randn(3, 24)),
    "linear-one": lambda: (nn.Linear(24, 1), torch.randn(3, 24)),
    "conv1d": lambda: (nn.Conv1d(12, 20, 3, padding=1), torch.randn(2, 12, 9)),
    "conv1d-point": lambda: (nn.Conv1d(12, 20, 1), torch.randn(2, 12, 9)),
    "conv2d": lambda: (nn.Conv2d(12, 20, (3, 2), stride=2), torch.randn(2, 12, 8, 9)),
    "conv2d-grouped": lambda: (nn.Conv2d(12, 20, 3, groups=4, padding=1), torch.randn(2, 12, 8, 9)),
    "conv2d-point": lambda: (nn.Conv2d(12, 20, 1), torch.randn(2, 12, 8, 9)),
}
"""Every layer on which the cases are tried; the layer is called ``layer``."""
LYCORIS = [
    {"rank": 3, "alpha": 5.0},
    {"rank": 3, "tucker": True},
    {"rank": 8},
]
# PEFT asks for scikit-learn.
ADAMSS = (8, 15) if importlib.util.find_spec("sklearn") else ()
CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    *[("loha", settings, tuple(LAYERS)) for settings in LYCORIS],
    ("lokr", {"rank": 1, "factor": 2}, tuple(LAYERS)),
    ("lokr", {"rank": 2, "factor": 2, "tucker": True}, tuple(LAYERS)),
    ("lokr", {"rank": 1, "decompose_both": True, "alpha": 2.0}, tuple(LAYERS)),
    ("beft", {}, ("linear", "linear-no-bias")),
    ("glora", {"rank": 3}, ("linear", "linear-no-bias")),
    (
        "glora",
        {"weight": "vector", "prompt": "vector", "bias": "vector"},
        ("linear", "linear-no-bias", "linear-one"),
    ),
    ("glora", {"weight": "constant", "prompt": "none", "bias": "constant"}, ("linear", "linear-no-bias")),
    ("glora", {"weight": "none", "bias": "none"}, ("linear",)),
    *[("adamss", {"subspaces": 3, "basis_rank": rank}, ("linear", "linear-no-bias")) for rank in ADAMSS],
    ("lokr", {"rank": 9}, ("linear", "conv2d", "conv2d-grouped", "conv2d-point")),
]
ALL = [
    pytest.param(name, settings, layer, id=f"{name}-{i}-{layer}")
    for i, (name, settings, layers) in enumerate(CASES)
    for layer in layers
]


@pytest.fixture
def made(layer: str) -> tuple[Callable[[], nn.Module], torch.Tensor]:
    module, x = LAYERS[layer]()
    state = module.state_dict()

    def again() -> nn.Module:
        twin = LAYERS[layer]()[0]
        twin.load_state_dict(state)
        return _named(twin)

    return again, x


def _named(layer: nn.Module) -> nn.Module:
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model


def _stirred(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize(("name", "settings", "layer"), ALL)
def test_both_ways(
    name: str,
    settings: dict[str, Any],
    made: tuple[Callable[[], nn.Module], torch.Tensor],
    tmp_path: Path,
    differing: Callable[..., float],
) -> None:
    again, x = made
    ours, method = again(), registry.get(name).from_settings(settings)
    before = ours(x)
    handle = attach(ours, method, targets=["layer"])
    _stirred(handle.parameters())
    wanted = ours(x)
    assert (wanted - before).abs().max() > 1e-3
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(again(), tmp_path, is_trainable=True).eval()
    assert differing(handle, "written", theirs(x), wanted) <= 1e-5
    _stirred(theirs.parameters())
    wanted = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    back = again()
    handle = import_peft(back, tmp_path / "theirs")
    assert differing(handle, "read", back(x), wanted) <= 1e-5


def test_a_three_dimensional_convolution_is_not_written(tmp_path: Path) -> None:
    handle = attach(_named(nn.Conv3d(4, 6, 2)), registry.get("loha")(rank=2), targets=["layer"])
    with pytest.raises(ExportError, match="three-dimensional"):
        write_peft(handle, tmp_path)


def test_whole_matrices_of_one_dimensional_convolutions_are_refused(tmp_path: Path) -> None:
    model = _named(nn.Conv1d(12, 20, 3))
    handle = attach(model, registry.get("lokr")(rank=9), targets=["layer"])
    with pytest.raises(ExportError, match="one-dimensional"):
        write_peft(handle, tmp_path)
    config = peft.LoKrConfig(r=9, target_modules=["layer"])
    peft.get_peft_model(_named(nn.Conv1d(12, 20, 3)), config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="one-dimensional"):
        import_peft(_named(nn.Conv1d(12, 20, 3)), tmp_path / "theirs")


def test_groups_of_rows_that_rounding_makes_are_refused(tmp_path: Path) -> None:
    handle = attach(_named(nn.Linear(24, 20)), registry.get("adamss")(), targets=["layer"])
    with pytest.raises(ExportError, match="as far from each other"):
        write_peft(handle, tmp_path)


def test_ranks_that_differ_by_group_are_refused_by_name(tmp_path: Path) -> None:
    model = _named(nn.Linear(24, 20))
    handle = attach(model, registry.get("adamss")(basis_rank=8, subspaces=2), targets=["layer"])
    write_peft(handle, tmp_path)
    handle.detach()
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_dynamic_rank": True}))
    with pytest.raises(CheckpointError, match="use_dynamic_rank"):
        import_peft(model, tmp_path)


def test_what_stands_for_an_untrained_part_has_to_be_zero(tmp_path: Path) -> None:
    model = _named(nn.Linear(24, 20))
    handle = attach(model, registry.get("glora")(rank=2, prompt="none"), targets=["layer"])
    write_peft(handle, tmp_path)
    handle.detach()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.layer.glora_C.zeros"][3] = 1.0
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="not zero"):
        import_peft(model, tmp_path)
    assert type(model.layer) is nn.Linear
