from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import addenda
from addenda.core.attaching import attach_paths
from addenda.core.fingerprints import fingerprint
from addenda.errors import CheckpointError, ConfigError, NotFoundError


def base() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = base()
    handle = addenda.attach(model, addenda.LoRA(rank=2, ranks={"2.0": 3}), "all-linear", name="note")
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    return addenda.save(model, tmp_path / "adapter", provenance={"seed": 3})


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    manifest = json.loads((folder / "adapter.json").read_text())
    change(manifest)
    (folder / "adapter.json").write_text(json.dumps(manifest))


def rewrite_tensors(folder: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    digest = hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda m: m["files"]["adapter.safetensors"].update(sha256=digest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit": (
        lambda f: (f / "adapter.safetensors").write_bytes(
            (b := (f / "adapter.safetensors").read_bytes())[:-1] + bytes([b[-1] ^ 1])
        ),
        "SHA-256 differs",
    ),
    "truncated": (
        lambda f: (f / "adapter.safetensors").write_bytes((f / "adapter.safetensors").read_bytes()[:-7]),
        "SHA-256 differs",
    ),
    "no tensors": (lambda f: (f / "adapter.safetensors").unlink(), "lacks adapter.safetensors"),
    "no manifest": (lambda f: (f / "adapter.json").unlink(), "holds no adapter"),
    "not json": (lambda f: (f / "adapter.json").write_text("{"), "not readable"),
    "a list": (lambda f: (f / "adapter.json").write_text("[]"), "not an adapter's manifest"),
    "duplicate key": (
        lambda f: (f / "adapter.json").write_text('{"method": 1, "method": 2}'),
        "duplicate key",
    ),
    "newer format": (lambda f: edit(f, lambda m: m.update(format_version=99)), "format version 99"),
    "unknown method": (lambda f: edit(f, lambda m: m.update(method="lorra")), "no method is called 'lorra'"),
    "unknown setting": (lambda f: edit(f, lambda m: m["settings"].update(rnk=1)), "unknown settings"),
    "bad setting": (lambda f: edit(f, lambda m: m["settings"].update(alpha=-1)), "alpha must be"),
    "huge rank": (lambda f: edit(f, lambda m: m["settings"].update(rank=200_000)), "rank 200000 exceeds"),
    "other rank": (lambda f: edit(f, lambda m: m["settings"].update(rank=4)), "has shape"),
    "layer of no model": (lambda f: edit(f, lambda m: m["layers"].append("9")), "'9' is no adaptable layer"),
    "no layers": (lambda f: edit(f, lambda m: m["layers"].clear()), "misstates layers"),
    "fewer layers": (lambda f: edit(f, lambda m: m["layers"].remove("0")), "belong to nothing"),
    "other base": (lambda f: edit(f, lambda m: m["base"].update(fingerprint="sha256-0")), "another base"),
    "missing tensor": (lambda f: rewrite_tensors(f, lambda t: t.pop("0.A")), "missing, first '0.A'"),
    "extra tensor": (lambda f: rewrite_tensors(f, lambda t: t.update(x=torch.ones(1))), "belong to nothing"),
    "NaN": (lambda f: rewrite_tensors(f, lambda t: t["0.A"].fill_(float("nan"))), "not finite"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused_and_the_model_stays_as_it_was(saved: Path, kind: str) -> None:
    damage, says = DAMAGE[kind]
    damage(saved)
    model = base()
    with pytest.raises((CheckpointError, NotFoundError)) as caught:
        addenda.load(model, saved)
    assert says in str(caught.value)
    assert caught.value.hint
    assert not addenda.core.handles(model)
    assert {type(m).__name__ for m in model.modules()} == {"Sequential", "Linear", "ReLU"}


def test_a_layer_whose_path_is_also_another_ones_end_comes_back_to_its_own_place(tmp_path: Path) -> None:
    model = base()
    only_outer = attach_paths(model, addenda.LoRA(rank=2), ["0"], name="x")
    addenda.save(model, tmp_path / "a")
    only_outer.detach()
    assert addenda.load(model, tmp_path / "a").paths == ["0"]


def test_another_base_of_the_same_shape_is_refused(saved: Path) -> None:
    model = base()
    with torch.no_grad():
        model[0].weight[0, 0] += 0.5
    with pytest.raises(CheckpointError, match="another base"):
        addenda.load(model, saved)


def test_loading_is_frozen_unless_it_is_to_train(saved: Path) -> None:
    model = base()
    handle = addenda.load(model, saved)
    assert not any(p.requires_grad for p in handle.parameters())
    handle.detach()
    assert all(p.requires_grad for p in addenda.load(model, saved, trainable=True).parameters())


def test_saving_replaces_an_adapter_but_nothing_else(saved: Path, tmp_path: Path) -> None:
    model = base()
    addenda.load(model, saved)
    addenda.save(model, saved)
    addenda.load(base(), saved)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no adapter folder"):
        addenda.save(model, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "mine"]


def test_saving_without_or_among_several_adapters_asks_for_the_name(tmp_path: Path) -> None:
    model = base()
    with pytest.raises(NotFoundError, match="carries 0 adapters"):
        addenda.save(model, tmp_path / "a")
    for name in ("one", "two"):
        addenda.attach(model, addenda.LoRA(rank=1), "0", name=name)
    with pytest.raises(NotFoundError, match="carries 2 adapters"):
        addenda.save(model, tmp_path / "a")
    addenda.save(model, tmp_path / "a", name="two")


def test_a_non_finite_adapter_is_never_saved(tmp_path: Path) -> None:
    model = base()
    handle = addenda.attach(model, addenda.LoRA(rank=1), "2.0")
    handle.adapters["2.0"].B.data[0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        addenda.save(model, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_fingerprint_sees_values_and_names_but_neither_adapters_merging_nor_width() -> None:
    model = base().bfloat16()
    mark = fingerprint(model)
    assert fingerprint(base().bfloat16().float()) == mark
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear")
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    assert fingerprint(model) == mark
    handle.merge()
    assert fingerprint(model) == mark
    handle.detach()
    assert fingerprint(model) == mark
    with torch.no_grad():
        model[0].bias[0] += 1
    assert fingerprint(model) != mark
    assert fingerprint(nn.Sequential(nn.Linear(6, 6))) != fingerprint(nn.ModuleDict({"a": nn.Linear(6, 6)}))


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class WithState(nn.Linear):
    """A layer that keeps more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        assert state == {"version": 1}


BASES: dict[str, Callable[[], nn.Module]] = {
    "the layer is the model": lambda: nn.Linear(6, 6, bias=False),
    "one layer at two places": Twice,
    "state that is no tensor": lambda: nn.Sequential(WithState(6, 6)),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", [addenda.LoRA(rank=2), addenda.BitFit()], ids=lambda m: m.name)
@pytest.mark.parametrize("merged", [False, True])
def test_what_is_saved_loads_again_on_the_same_base(
    kind: str, method: addenda.Method, merged: bool, tmp_path: Path
) -> None:
    model, x = BASES[kind](), torch.randn(3, 6)
    handle = addenda.attach(model, method, "all-linear", probe=x)
    for parameter in handle.parameters():
        nn.init.normal_(parameter)
    adapted = model(x)
    if merged:
        handle.merge()
    addenda.save(model, tmp_path / "a")
    handle.detach()
    addenda.load(model, tmp_path / "a")
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("folder", [".", "..", "a/.."])
def test_a_folder_that_cannot_be_replaced_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path)
    model = base()
    addenda.attach(model, addenda.LoRA(rank=2), "0")
    with pytest.raises(CheckpointError, match="cannot be replaced"):
        addenda.save(model, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_provenance_that_json_cannot_hold_is_refused_before_anything_is_written(
    value: object, tmp_path: Path
) -> None:
    model = base()
    addenda.attach(model, addenda.LoRA(rank=2), "0")
    with pytest.raises(ConfigError, match="provenance"):
        addenda.save(model, tmp_path / "a", provenance={"fact": value})
    assert not list(tmp_path.iterdir())


def test_an_adapter_without_values_is_not_saved(tmp_path: Path) -> None:
    model = base().to("meta")
    addenda.attach(model, addenda.LoRA(rank=2), "0")
    with pytest.raises(CheckpointError, match="no values"):
        addenda.save(model, tmp_path / "a")
