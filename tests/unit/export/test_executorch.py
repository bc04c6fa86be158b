"""ExecuTorch programs: they answer like the trained model at other sizes than traced, and what is wrong is named."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import addenda
from addenda.errors import ExportError
from addenda.export.executorch.lowering import bounds_of, write_program
from addenda.export.formats.executorch import FILE, FORMAT
from addenda.export.job import Job
from addenda.export.probes import Probes, Row, answer
from addenda.export.run import export_adapter
from addenda.export.runtimes.executorch import ExecuTorchRuntime

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="ExecuTorch is not installed: make test-edge"
)


class Picture(nn.Module):
    """Convolutions, plain and depthwise, with norms that are folded into them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.head = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(torch.relu(self.norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


def encoder() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    return transformers.BertModel(config)


def decoder() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    return transformers.LlamaForCausalLM(config)


def tokens(batch: int, length: int, *, masked: bool = True) -> Row:
    ids = torch.randint(0, 90, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} if masked else {"input_ids": ids}


class Reader(nn.Module):
    """A causal model that is none of transformers': it is run whole."""

    def __init__(self) -> None:
        super().__init__()
        self.model = decoder()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


KINDS = {
    "encoder": (encoder, ["query", "value", "dense"], "features", [tokens(2, n) for n in (5, 11)]),
    "reader": (Reader, ["q_proj", "down_proj"], "next-token", [tokens(1, n, masked=False) for n in (6, 13)]),
    "picture": (Picture, ["stem", "head"], "classes", [{"x": torch.randn(2, 3, 12, 12)} for _ in range(6)]),
}


def job_of(name: str, method: addenda.Method | None = None, type: str = "float32") -> Job:
    make, targets, kind, rows = KINDS[name]
    model = make().eval()
    handle = addenda.attach(model, method or addenda.LoRA(rank=2), targets, seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    return Job(model, handle, Probes(tuple(rows), kind), None, type)


def export(job: Job, folder: Path, **options: object) -> addenda.export.parity.Parity:
    return export_adapter(
        job.model,
        job.handle,
        "executorch",
        folder,
        type=job.type,
        inputs=job.probes.rows,
        kind=job.probes.kind,
        **options,
    )


def others(name: str) -> list[Row]:
    """Rows of sizes that were not traced, the smallest and the largest among them."""
    if name == "picture":
        return [{"x": torch.randn(batch, 3, 12, 12)} for batch in (1, 3, 8)]
    if name == "reader":
        return [tokens(1, length, masked=False) for length in (1, 7, 40)]
    rows = [tokens(*size) for size in ((1, 1), (3, 8), (8, 40))]
    rows[1]["attention_mask"][:, -2:] = 0
    return rows


@needs_executorch
@pytest.mark.parametrize("name", list(KINDS))
def test_it_answers_at_other_sizes_than_traced(name: str, tmp_path: Path) -> None:
    job = job_of(name)
    before = {key: value.clone() for key, value in job.model.state_dict().items()}
    parity = export(job, tmp_path / "out")
    assert parity.verdict == "passed", parity
    assert all(torch.equal(value, before[key]) for key, value in job.model.state_dict().items())
    with FORMAT.open(job, tmp_path / "out", exact=False) as runtime:
        for row in others(name):
            wanted, found = answer(job.model, row, job.probes.kind), runtime.answer(row, job.probes.kind)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    told = (tmp_path / "out" / "README.md").read_text()
    assert "≤" in told


@needs_executorch
def test_what_is_larger_than_its_bounds_is_refused(tmp_path: Path) -> None:
    job = job_of("picture")
    FORMAT.write(job, tmp_path)
    with (
        FORMAT.open(job, tmp_path, exact=True) as runtime,
        pytest.raises(ExportError, match="cannot run") as caught,
    ):
        runtime.answer({"x": torch.randn(9, 3, 12, 12)}, "classes")
    assert "bounds" in caught.value.hint


@needs_executorch
@pytest.mark.parametrize("name", ["encoder", "picture"])
def test_int8_is_smaller_and_says_what_it_has_lost(name: str, tmp_path: Path) -> None:
    job = job_of(name, type="int8")
    parity = export(job, tmp_path / "out", allow_drift=True)
    assert parity.verdict in {"passed", "drifted"}, parity
    assert parity.twin is not None
    assert parity.real is not None
    assert parity.twin.exact
    assert parity.real.largest_difference > parity.twin.largest_difference
    assert parity.real.effect_cosine is not None
    assert parity.real.effect_cosine.value > 0.9


@needs_executorch
@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("layer", ["linear", "convolution", "convolution with its norm"])
def test_what_is_clamped_has_all_eight_bits_for_what_is_left(
    layer: str, inplace: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    made: list[nn.Module] = [nn.Linear(8, 8)] if layer == "linear" else [nn.Conv2d(3, 8, 3)]
    made += [nn.BatchNorm2d(8)] if "norm" in layer else []
    model = nn.Sequential(*made, nn.ReLU6(inplace=inplace), nn.Flatten()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    shape = (200, 8) if layer == "linear" else (4, 3, 32, 32)
    rows = [{"input": torch.randn(shape)} for _ in range(8)]
    write_program(model, rows, bounds_of(rows), tmp_path / FILE, int8=True)
    with ExecuTorchRuntime(tmp_path / FILE, ["input"]) as runtime:
        found = torch.cat([runtime.answer(row, "features").flatten() for row in rows])
    assert 5.9 < found.max() <= 6.1
    assert len(found.unique()) > 128  # if the whole range had been spread over 256 steps, a few would be left


@needs_executorch
def test_int8_has_room_for_what_calibration_shows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()).eval()
    small = [{"input": torch.rand(2, 3, 8, 8)} for _ in range(4)]
    large = [{"input": 20 * row["input"]} for row in small]
    differences = {}
    for name, seen in {"none": (), "large": large}.items():
        write_program(model, small, bounds_of(small), tmp_path / name, int8=True, seen=seen)
        with ExecuTorchRuntime(tmp_path / name, ["input"]) as runtime, torch.no_grad():
            wanted = torch.cat([model(**row) for row in large])
            found = torch.cat([runtime.answer(row, "features") for row in large])
        differences[name] = float((found - wanted).norm() / wanted.norm())
    assert differences["large"] < 0.05
    assert differences["none"] > 0.5


@needs_executorch
def test_an_adapter_that_cannot_be_folded_runs_as_it_is(tmp_path: Path) -> None:
    assert not addenda.Bottleneck.mergeable
    job = job_of("picture", addenda.Bottleneck(size=3))
    assert export(job, tmp_path / "out").verdict == "passed"


@needs_executorch
def test_a_layer_without_its_adapter_is_named(tmp_path: Path) -> None:
    job = job_of("encoder")
    FORMAT.write(job, tmp_path)
    assert FORMAT.audit(job, tmp_path) == []
    path = "encoder.layer.1.attention.self.value"
    with torch.no_grad():
        for parameter in job.handle.adapters[path].parameters():
            parameter.mul_(2.0)
    assert FORMAT.audit(job, tmp_path) == [f"'{path}' has another weight"]
    with torch.no_grad():
        for parameter in job.handle.adapters[path].parameters():
            parameter.zero_()
    FORMAT.write(job, tmp_path)
    with torch.no_grad():
        for parameter in job.handle.adapters[path].parameters():
            parameter.normal_()
    assert FORMAT.audit(job, tmp_path) == [f"'{path}' has its weight without the adapter"]


@needs_executorch
def test_swapped_layers_answer_otherwise_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FORMAT.write

    def swap(job: Job) -> None:
        one, other = (job.handle.adapters[f"encoder.layer.{n}.attention.self.query"] for n in (0, 1))
        for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
            mine.data, theirs.data = theirs.data, mine.data

    def swapped(job: Job, folder: Path) -> None:
        swap(job)
        write(job, folder)
        swap(job)

    monkeypatch.setattr(FORMAT, "write", swapped)
    with pytest.raises(ExportError, match=r"encoder\.layer\.0\.attention\.self\.query"):
        export(job_of("encoder"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@needs_executorch
def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    job = job_of("picture")
    FORMAT.write(job, tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 3])
    assert FORMAT.audit(job, tmp_path)
    with pytest.raises(ExportError, match="cannot load"):
        FORMAT.open(job, tmp_path, exact=True)


@needs_executorch
def test_a_forward_that_branches_on_values_is_refused(tmp_path: Path) -> None:
    class Branching(Picture):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else self.head(x.mean(dim=(2, 3)))

    model = Branching().eval()
    handle = addenda.attach(
        model, addenda.LoRA(rank=2), ["stem"], seed=1, probe={"x": torch.ones(1, 3, 12, 12)}
    )
    with pytest.raises(ExportError, match="cannot hold Branching"):
        export_adapter(
            model, handle, "executorch", tmp_path / "out", inputs=KINDS["picture"][3], kind="classes"
        )
    assert list(tmp_path.iterdir()) == []


def test_without_executorch_the_extra_is_named_and_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ImportError, match="executorch") as caught:
        export(job_of("picture"), tmp_path / "out")
    assert "addenda[executorch]" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bounds_are_those_of_the_rows_where_they_are_larger() -> None:
    rows = [{"ids": torch.zeros(3, 7, dtype=torch.long), "x": torch.zeros(3, n, 4)} for n in (2, 5)]
    found = bounds_of(rows, batch=2, length=6)
    assert found == {"ids": {0: ("batch", 3), 1: ("length", 7)}, "x": {0: ("batch", 3), 1: ("x_1", 5)}}
    assert bounds_of([{"x": torch.zeros(1, 4)}], batch=1) == {"x": {}}
