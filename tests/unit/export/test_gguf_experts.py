"""Adapters on stacked experts as llama.cpp keeps them: proven there, read back, and every known fault named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_gguf_lora as lora
import test_gguf_made as made
import test_gguf_merged as merged
import test_gguf_writing as writing
import torch

import addenda
from addenda.bases import load_base
from addenda.errors import ExportError
from addenda.export.foreign import foreign_adapter
from addenda.export.formats.gguf_lora import FILE, audit_adapter
from addenda.export.gguf.adapter import read_adapter, write_adapter
from addenda.export.gguf.copying import read_tensor, write_like
from addenda.export.gguf.factors import StackedFactors, apart, factors_of, stacked
from addenda.export.gguf.made import made_gguf
from addenda.export.gguf.merging import audit_merged, write_merged_gguf
from addenda.export.gguf.origin import Origin, origin_of
from addenda.export.job import Job
from addenda.export.probes import probes_of
from addenda.export.run import export_adapter

QWEN_2 = writing.SPLITS["qwen2"][0]
pytestmark = pytest.mark.usefixtures("shared_home")
installed = lora.installed
RANKS = {"experts.1.down_proj": 2, "experts.2.gate_up_proj": 6}
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> addenda.LoadedBase:
    return load_base(made.saved(tmp_path_factory.mktemp("experts"), "qwen3_moe"))


@pytest.fixture
def handle(base: addenda.LoadedBase) -> Iterator[addenda.Handle]:
    """On all experts but one of a layer."""
    left_out = {"model.layers.0.mlp.experts.3.down_proj"}
    planned = addenda.plan(base.model, addenda.LoRA(rank=4), ["gate_up_proj", "down_proj"])
    targets = [row.path for row in planned.rows if row.path not in left_out]
    found = lora.adapted(base, addenda.LoRA(rank=4, alpha=6.0, ranks=RANKS), targets)
    yield found
    found.detach()


def adapted(base: addenda.LoadedBase, targets: Any) -> addenda.Handle:
    one_row = hasattr(base.model.config, "shared_expert_intermediate_size") and targets == "all-linear"
    ranks = {"shared_expert_gate": 1} if one_row else {}
    return lora.adapted(base, addenda.LoRA(rank=4, alpha=6.0, ranks=ranks), targets)


def job_of(base: addenda.LoadedBase, handle: addenda.Handle) -> Job:
    return Job(base.model, handle, probes_of(base), base)


# ---------------------------------------------------------------------------------------------------------- proven


@installed
@pytest.mark.parametrize(
    ("family", "to", "kind", "targets"),
    [
        ("mixtral", "gguf-lora", None, "all-linear"),
        ("qwen2_moe", "gguf-lora", None, "all-linear"),
        ("qwen3_moe", "gguf-lora", None, ["experts.1.gate_up_proj", "experts.2.down_proj"]),
        ("mixtral", "gguf", "base+q8_0", ["experts.0.gate_up_proj", "experts.3.down_proj"]),
        ("qwen2_moe", "gguf", "q8_0", "all-linear"),
        ("qwen3_moe", "gguf", "f32", "all-linear"),
    ],
)
def test_it_answers_in_llama_cpp_as_trained(
    family: str, to: str, kind: str | None, targets: Any, tmp_path: Path
) -> None:
    base = load_base(made.saved(tmp_path / "base", family))
    parity = export_adapter(base, adapted(base, targets), to, tmp_path / "out", type=kind)
    assert parity.verdict == "passed"
    assert parity.twin.largest_difference < 1e-3 < parity.effect / 20


@installed
@pytest.mark.parametrize(("family", "to"), [("qwen2_moe", "gguf"), ("qwen3_moe", "gguf-lora")])
def test_experts_of_a_gguf_base_go_back_to_its_file(family: str, to: str, tmp_path: Path) -> None:
    folder = made.saved(tmp_path / "base", family, QWEN_2, torch.bfloat16)
    first = load_base(folder, dtype=torch.float32)
    base = load_base(made_gguf(first), cache_dir=tmp_path / "cache", dtype=torch.float32)
    ids = torch.randint(3, 250, (1, 20))
    torch.testing.assert_close(base.model(input_ids=ids).logits, first.model(input_ids=ids).logits)
    parity = export_adapter(base, adapted(base, "all-linear"), to, tmp_path / "out")
    assert parity.verdict == "passed"
    # transformers composes letters of two code points before it tokenizes a text of Qwen's, and llama.cpp does not.
    assert 0.9 < parity.chat.same_tokens / parity.chat.conversations < 1


# ------------------------------------------------------------------------------------------------------- read back


def test_factors_come_back_as_they_went(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin = origin_of(base)
    write_adapter(handle, origin, tmp_path / FILE)
    found, meant = read_adapter(tmp_path / FILE, origin), factors_of(handle)
    assert sorted(found) == sorted(meant)  # the expert without an adapter has none
    for path, each in meant.items():
        torch.testing.assert_close(found[path].delta(), each.delta())
        assert len(found[path].A) == len(each.A)


def test_an_adapter_that_somebody_made_answers_here_and_goes_out_as_it_came(
    base: addenda.LoadedBase, tmp_path: Path
) -> None:
    handle = lora.adapted(base, addenda.LoRA(rank=4), ["gate_up_proj", "down_proj", "q_proj"])
    ids = torch.arange(5, 30)[None]
    wanted, origin = base.model(input_ids=ids).logits, origin_of(base)
    write_adapter(handle, origin, tmp_path / FILE)
    handle.detach()
    foreign = foreign_adapter(tmp_path / FILE)
    assert foreign is not None
    again = foreign.attach(base)
    torch.testing.assert_close(base.model(input_ids=ids).logits, wanted)
    write_adapter(again, origin, tmp_path / "again.gguf")
    again.detach()
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / FILE).read_bytes()


def test_gate_and_up_of_different_factors_are_one_change() -> None:
    """Others train them apart, of different rank and scaling."""
    gate = StackedFactors(torch.randn(3, 2, 8), torch.randn(3, 5, 2), slice(0, 5), 0.5)
    up = StackedFactors(torch.randn(3, 4, 8), torch.randn(3, 5, 4), slice(5, 10), 3.0)
    for expert, found in enumerate(apart([gate, up], 10)):
        assert found is not None
        for each in (gate, up):
            wanted = each.scaling * each.B[expert] @ each.A[expert]
            torch.testing.assert_close(found.delta()[each.rows], wanted)


def test_folded_experts_lie_beside_those_of_the_base(
    base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin, own = origin_of(base), base.model.get_submodule(EXPERTS)
    write_merged_gguf(job_of(base, handle), origin, tmp_path / "model.gguf", "f32")
    gate, up, down = (
        merged.numbers(tmp_path / "model.gguf", f"blk.0.ffn_{name}_exps.weight")
        for name in ("gate", "up", "down")
    )
    for expert in range(4):
        folded, _ = handle.folded(f"{EXPERTS}.{expert}.gate_up_proj")
        torch.testing.assert_close(torch.cat([gate[expert], up[expert]]), folded)
    torch.testing.assert_close(down[1], handle.folded(f"{EXPERTS}.1.down_proj")[0])
    torch.testing.assert_close(down[3], own.down_proj[3])


# ------------------------------------------------------------------------------------------- broken on purpose

GATE, UP, DOWN = (f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))


def in_both(change: Callable[[Any], Any], *names: str) -> Any:
    """A change of both factors."""

    def broken(tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        for half in (f"{name}.{half}" for name in names for half in ("lora_a", "lora_b")):
            tensors[half] = change(tensors[half])

    return broken


def without_expert(number: int) -> Callable[[Any], Any]:
    def change(tensor: Any) -> Any:
        tensor[number] = 0
        return tensor

    return change


ADAPTER_FAULTS: dict[str, tuple[Any, str]] = {
    "two experts exchanged": (
        in_both(lambda tensor: tensor[[1, 0, 2, 3]], GATE, UP),
        f"'{EXPERTS}.0.gate_up_proj A' holds what belongs to '{EXPERTS}.1.gate_up_proj A'",
    ),
    "experts one on": (
        in_both(lambda tensor: tensor[[1, 2, 3, 0]], DOWN),
        f"'{EXPERTS}.3.down_proj A' is there and should not be",
    ),
    "gate and up exchanged": (
        lora.swapped(GATE, UP),
        f"'{EXPERTS}.0.gate_up_proj B' has the halves of its rows exchanged, as gate and up",
    ),
    "up dropped": (
        lora.dropped(f"{UP}.lora_a", f"{UP}.lora_b"),
        "gate_up_proj B' is zero in 32 of its 64 rows",
    ),
    "an expert dropped": (in_both(without_expert(2), DOWN), f"'{EXPERTS}.2.down_proj A' is missing"),
    "one expert too few": (in_both(lambda tensor: tensor[:3].copy(), DOWN), f"factors of '{DOWN}' are"),
    "layers exchanged": (
        lora.swapped(DOWN, DOWN.replace("0", "1")),
        "holds what belongs to 'model.layers.1.mlp.experts.0.down_proj A'",
    ),
}


@pytest.mark.parametrize("fault", ADAPTER_FAULTS)
def test_a_broken_adapter_is_named(
    fault: str, base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    change, text = ADAPTER_FAULTS[fault]
    write_adapter(handle, origin_of(base), tmp_path / FILE)
    job = job_of(base, handle)
    assert audit_adapter(job, tmp_path / FILE) == []
    lora.rewrite(tmp_path / FILE, tmp_path / "broken.gguf", change)
    assert text in "; ".join(audit_adapter(job, tmp_path / "broken.gguf"))


def in_tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda tensor, rows, file: change(rows) if tensor == name else None


def flipped(rows: torch.Tensor) -> torch.Tensor:
    rows[40, 9] ^= 4  # of the second expert's 32 rows
    return rows


def without_adapter(origin: Origin, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(rows: torch.Tensor) -> torch.Tensor:
        with origin.path.open("rb") as file:
            own = read_tensor(file, origin.tensors[UP]).chunk(4)
        return torch.cat([*rows.chunk(4)[:number], own[number], *rows.chunk(4)[number + 1 :]])

    return change


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("experts one on", f"'{DOWN}' holds in place of expert 0 what belongs to expert 1"),
        ("gate and up exchanged", f"'{GATE}' holds what belongs to '{UP}'"),
        ("adapter left out of one", f"'{UP}' holds expert 2 as the base has it, without the adapter"),
        ("adapter left out of all", f"'{UP}' is the base's own, without the adapter"),
        ("bit flipped", f"'{UP}' holds an expert, number 1, that differs in 1 of"),
    ],
)
def test_a_broken_merge_is_named(
    fault: str, text: str, base: addenda.LoadedBase, handle: addenda.Handle, tmp_path: Path
) -> None:
    origin, good, job = origin_of(base), tmp_path / "good.gguf", job_of(base, handle)
    write_merged_gguf(job, origin, good, "base")
    assert audit_merged(job, origin, good, "base") == []
    change = {
        "experts one on": lambda: in_tensor(
            DOWN, lambda rows: torch.cat([*rows.chunk(4)[1:], rows.chunk(4)[0]])
        ),
        "gate and up exchanged": lambda: merged.layers_swapped(good, GATE, UP),
        "adapter left out of one": lambda: in_tensor(UP, without_adapter(origin, 2)),
        "adapter left out of all": lambda: merged.without_adapter(origin, UP),
        "bit flipped": lambda: in_tensor(UP, flipped),
    }[fault]()
    write_like(good, tmp_path / "bad.gguf", merged.Broken(good, change))
    assert text in "; ".join(audit_merged(job, origin, tmp_path / "bad.gguf", "base"))


def exchanged(rows: slice) -> slice:
    """The other half of gate and up, 32 rows each."""
    return slice(32 - rows.start, 64 - rows.start) if rows.stop - rows.start == 32 else rows


def forget_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = Origin.paths
    monkeypatch.setattr(Origin, "paths", lambda origin, stack: paths(origin, stack)[::-1])


def exchange_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def taking_apart(stacks: list[StackedFactors], d_out: int) -> Any:
        return apart([replace(each, rows=exchanged(each.rows)) for each in stacks], d_out)

    module = "addenda.export.gguf.adapter"
    monkeypatch.setattr(f"{module}.stacked", lambda each, rows, alpha: stacked(each, exchanged(rows), alpha))
    monkeypatch.setattr(f"{module}.apart", taking_apart)


@installed
@pytest.mark.parametrize(
    ("mistake", "to"),
    [(forget_the_order, "gguf-lora"), (forget_the_order, "gguf"), (exchange_gate_and_up, "gguf-lora")],
)
def test_where_writer_and_reader_agree_the_answers_show_it(
    mistake: Callable[[pytest.MonkeyPatch], None],
    to: str,
    base: addenda.LoadedBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    handle = adapted(base, ["gate_up_proj", "down_proj"])
    mistake(monkeypatch)
    with pytest.raises(ExportError, match="an answer differs by"):
        export_adapter(base, handle, to, tmp_path / "out", allow_drift=True)
    assert not list(tmp_path.iterdir())
    handle.detach()
