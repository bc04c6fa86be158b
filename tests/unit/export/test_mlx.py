"""mlx-lm's adapters and model folders: what is written, read, found to be wrong, and answered there."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
import torch
import transformers
from safetensors.torch import load_file, save_file

import addenda
from addenda.bases import load_base
from addenda.errors import CheckpointError, ConfigError, ExportError, NotFoundError
from addenda.export.formats.mlx import FORMAT
from addenda.export.job import Job
from addenda.export.mlx import CONFIG, TENSORS, adapter_audit, import_mlx, is_mlx, with_rope, write_adapter
from addenda.export.probes import answer, probes_of
from addenda.export.run import export_adapter
from addenda.export.runtimes.mlx import MLXRuntime
from addenda.recipe import load_adapted

needs_mlx = pytest.mark.skipif(
    importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed: make test-edge"
)
THETA = 500_000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense base whose positions turn otherwise than mlx-lm would assume."""
    root = tmp_path_factory.mktemp("mlx")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**tiny_gguf.LLAMA)).eval()
    base = load_base(tiny_gguf.write_gguf(root / "tiny.gguf", model), cache_dir=root / "cache")
    base.model.config.rope_parameters["rope_theta"] = THETA
    base.model.save_pretrained(root / "base")
    base.tokenizer.save_pretrained(root / "base")
    return root / "base"


@pytest.fixture
def base(folder: Path) -> addenda.LoadedBase:
    return load_base(folder, dtype=torch.float32)


def attached(
    base: addenda.LoadedBase, method: object = None, targets: object = "all-linear"
) -> addenda.Handle:
    handle = addenda.attach(base.model, method or addenda.LoRA(rank=3), targets, seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    return handle


def logits(base: addenda.LoadedBase, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return base.model(ids).logits


def by_hand(base: addenda.LoadedBase, folder: Path) -> None:
    """Fold a folder into the base's weights as mlx-lm's layers compute: y + scale * (x @ lora_a) @ lora_b."""
    settings = json.loads((folder / CONFIG).read_text())["lora_parameters"]
    tensors = load_file(folder / TENSORS)
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        path = name.removesuffix(".lora_a")
        a, b = tensors[name], tensors[f"{path}.lora_b"]
        assert a.shape[1] == b.shape[0] == settings["rank"]
        with torch.no_grad():
            base.model.get_submodule(path).weight += settings["scale"] * (a @ b).T


METHODS = [
    addenda.LoRA(rank=4, alpha=3.0),
    addenda.LoRA(rank=2, ranks={"up_proj": 5}, alphas={"o_proj": 1.0}, rank_stabilized=True),
    addenda.LoRA(rank=3, start="pissa"),
]


@pytest.mark.parametrize("method", METHODS, ids=["one", "several", "pissa"])
def test_it_computes_what_was_trained(folder: Path, tmp_path: Path, method: addenda.LoRA) -> None:
    base, ids = load_base(folder, dtype=torch.float32), torch.randint(5, 90, (2, 13))
    handle = attached(base, method)
    write_adapter(handle, tmp_path, base_name="tiny")
    wanted = logits(base, ids)
    assert adapter_audit(handle, tmp_path) == []
    plain = load_base(folder, dtype=torch.float32)
    by_hand(plain, tmp_path)
    torch.testing.assert_close(logits(plain, ids), wanted, rtol=1e-4, atol=1e-4)


def test_reading_and_writing_again_changes_no_byte(base: addenda.LoadedBase, tmp_path: Path) -> None:
    ids = torch.randint(5, 90, (2, 9))
    handle = attached(base, METHODS[1])
    wanted, places = logits(base, ids), (tmp_path / "one", tmp_path / "two")
    for place in places:
        place.mkdir()
    write_adapter(handle, places[0], base_name="tiny")
    handle.detach()
    again = import_mlx(base.model, places[0])
    torch.testing.assert_close(logits(base, ids), wanted, rtol=1e-4, atol=1e-4)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    write_adapter(again, places[1], base_name="tiny")
    for name in (CONFIG, TENSORS):
        assert (places[0] / name).read_bytes() == (places[1] / name).read_bytes()


def test_the_folder_is_loaded_with_the_base_it_names(
    base: addenda.LoadedBase, folder: Path, tmp_path: Path
) -> None:
    write_adapter(attached(base), tmp_path, base_name=str(folder))
    loaded, handle, _ = load_adapted(tmp_path, device="cpu", on_event=lambda event: None)
    ids = torch.randint(5, 90, (1, 7))
    assert is_mlx(tmp_path)
    assert handle.method.name == "lora"
    torch.testing.assert_close(logits(loaded, ids), logits(base, ids), rtol=1e-4, atol=1e-4)


def test_the_last_blocks_are_told_as_mlx_lm_tells_them(base: addenda.LoadedBase, tmp_path: Path) -> None:
    write_adapter(attached(base, targets=["layers.1.self_attn.q_proj"]), tmp_path, base_name="tiny")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["num_layers"] == 1
    assert config["lora_parameters"]["keys"] == ["self_attn.q_proj"]


def test_blocks_that_differ_are_named_in_full(base: addenda.LoadedBase, tmp_path: Path) -> None:
    write_adapter(attached(base, targets=["layers.0.self_attn.q_proj"]), tmp_path, base_name="tiny")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["lora_parameters"]["keys"] == ["model.layers.0.self_attn.q_proj"]


def altered(folder: Path, change: object) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS)


Q0, Q1 = (f"model.layers.{number}.self_attn.q_proj" for number in (0, 1))


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q0}.lora_a"] = tensors[f"{Q0}.lora_a"].T


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{Q0}.lora_a"], tensors[f"{Q0}.lora_b"]


def swap(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{Q0}.lora_b"], tensors[f"{Q1}.lora_b"] = tensors[f"{Q1}.lora_b"], tensors[f"{Q0}.lora_b"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (transpose, rf"'{Q0}\.lora_a' has shape .*transposed"),
        (drop, rf"'{Q0}\.lora_a' is missing"),
        (swap, rf"'{Q0}\.lora_b' holds what belongs to '{Q1}\.lora_b'"),
    ],
)
def test_a_fault_is_named_and_leaves_nothing(
    base: addenda.LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, words: str
) -> None:
    handle, write = attached(base), FORMAT.write

    def faulty(job: Job, folder: Path) -> None:
        write(job, folder)
        altered(folder, change)

    monkeypatch.setattr(FORMAT, "write", faulty)
    # Without mlx-lm the audit still refuses; with it, mlx-lm may be the one to refuse a shape.
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(ExportError, match=words):
        export_adapter(base, handle, "mlx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_found(base: addenda.LoadedBase, tmp_path: Path) -> None:
    handle = attached(base)
    write_adapter(handle, tmp_path, base_name="tiny")
    whole = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in adapter_audit(handle, tmp_path)[0]
    handle.detach()
    with pytest.raises(CheckpointError, match="damaged"):
        import_mlx(base.model, tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(fine_tune_type="dora"), "fine_tune_type 'dora'"),
        (lambda c: c["lora_parameters"].update(rank=7), "not of rank 7"),
        (lambda c: c["lora_parameters"].update(scale="2"), "scale = '2'"),
        (lambda c: c["lora_parameters"].update(keys=["mlp.up_proj"]), "none of the keys"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    base: addenda.LoadedBase, tmp_path: Path, change: object, words: str
) -> None:
    handle = attached(base)
    write_adapter(handle, tmp_path, base_name="tiny")
    handle.detach()
    before = dict(base.model.state_dict())
    config = json.loads((tmp_path / CONFIG).read_text())
    change(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=words):
        import_mlx(base.model, tmp_path)
    assert base.model.state_dict().keys() == before.keys()


def test_a_missing_file_is_named(base: addenda.LoadedBase, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=CONFIG):
        import_mlx(base.model, tmp_path)


def test_one_factor_of_two_is_refused(base: addenda.LoadedBase, tmp_path: Path) -> None:
    handle = attached(base)
    write_adapter(handle, tmp_path, base_name="tiny")
    handle.detach()
    altered(tmp_path, lambda tensors: tensors.pop(f"{Q0}.lora_a"))
    with pytest.raises(CheckpointError, match="one factor of two"):
        import_mlx(base.model, tmp_path)


def test_without_mlx_lm_it_is_written_but_not_verified(
    base: addenda.LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    parity = export_adapter(base, attached(base), "mlx", tmp_path / "out")
    assert parity.verdict == "unverified"
    assert "pip install 'addenda[mlx]'" in parity.words


def test_what_it_cannot_carry_is_said_beforehand() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    planned = addenda.plan(model, addenda.LoRA(rank=1), ["0"])
    assert "causal language models" in FORMAT.problems(planned, model, None)[0]
    with pytest.raises(ConfigError, match="causal language models"):
        addenda.export.format.require_formats(["mlx"], planned, model)


def test_a_module_that_was_not_loaded_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    handle = addenda.attach(model, addenda.LoRA(rank=1), ["0"])
    with pytest.raises(ExportError, match="no causal language model"):
        export_adapter(
            model, handle, "mlx", tmp_path / "out", inputs=[{"input": torch.randn(1, 4)}], kind="features"
        )
    assert list(tmp_path.iterdir()) == []


def test_positions_of_several_kinds_of_layers() -> None:
    told = with_rope(
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        }
    )
    assert (told["rope_theta"], told["rope_local_base_freq"]) == (1e6, 1e4)
    assert told["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 8.0}
    assert with_rope({"vocab_size": 3}) == {"vocab_size": 3}


def merged(base: addenda.LoadedBase, handle: addenda.Handle, folder: Path) -> Job:
    job = Job(base.model, handle, probes_of(base), base, "float32")
    FORMAT.write(job, folder)
    return job


def test_a_merged_model_tells_its_rotation_at_the_top(base: addenda.LoadedBase, tmp_path: Path) -> None:
    job = merged(base, attached(base), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == THETA
    assert FORMAT.audit(job, tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 10_000.0}))
    assert "rope_theta" in FORMAT.audit(job, tmp_path)[0]


def test_faults_of_a_merged_model_are_named(base: addenda.LoadedBase, tmp_path: Path) -> None:
    job, path = merged(base, attached(base), tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{Q0}.weight"], tensors[f"{Q1}.weight"] = tensors[f"{Q1}.weight"], tensors[f"{Q0}.weight"]
    save_file(tensors, path)
    found = FORMAT.audit(job, tmp_path)
    assert len(found) == 2
    assert f"'{Q0}' does not hold" in found[0]
    assert f"'{Q1}' holds them" in found[0]
    path.write_bytes(path.read_bytes()[:1000])
    assert "cannot be read" in FORMAT.audit(job, tmp_path)[0]


@needs_mlx
@pytest.mark.parametrize("kind", ["adapter", "float32", "bfloat16"])
def test_mlx_lm_answers_like_the_trained_model(base: addenda.LoadedBase, tmp_path: Path, kind: str) -> None:
    parity = export_adapter(base, attached(base, METHODS[1]), "mlx", tmp_path / "out", type=kind)
    assert parity.verdict == "passed", parity
    assert parity.twin is not None
    assert parity.twin.largest_difference < 1e-4
    assert (parity.real is parity.twin) == (kind != "bfloat16")
    assert parity.chat is not None
    assert not list(tmp_path.glob(".*"))


@needs_mlx
@pytest.mark.parametrize("blocks", [1, -1])
def test_an_adapter_that_mlx_lm_trained_answers_here_as_there(
    base: addenda.LoadedBase, folder: Path, tmp_path: Path, blocks: int
) -> None:
    rows = "".join(json.dumps({"text": f"the answer to {n} is {n * n}"}) + "\n" for n in range(8))
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    model, trained = shutil.copytree(folder, tmp_path / "base"), tmp_path / "adapter"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "rope_theta": THETA})
    )  # where mlx-lm looks for it
    settings = {"--iters": 6, "--batch-size": 2, "--learning-rate": 0.05, "--num-layers": blocks, "--seed": 3}
    told = [str(each) for pair in settings.items() for each in pair]
    command = [sys.executable, "-m", "mlx_lm", "lora", "--train", "--model", str(model)]
    subprocess.run(
        [*command, "--data", str(tmp_path), "--adapter-path", str(trained), *told],
        check=True,
        capture_output=True,
        env={**os.environ, "MLX_DEFAULT_DEVICE": "cpu"},
    )

    assert is_mlx(trained)
    asked = probes_of(base).rows[:4]
    bare = [answer(base.model, row, "next-token") for row in asked]
    import_mlx(base.model, trained)
    with MLXRuntime(model, trained) as runtime:
        for row, before in zip(asked, bare, strict=True):
            wanted = runtime.answer(row, "next-token")
            assert (wanted - before).abs().max() > 0.1
            torch.testing.assert_close(answer(base.model, row, "next-token"), wanted, atol=1e-4, rtol=0)


@needs_mlx
def test_mlx_lm_shows_a_wrong_rotation(
    base: addenda.LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("addenda.export.formats.mlx.with_rope", lambda config: config)
    monkeypatch.setattr(type(FORMAT), "audit", lambda *_: [])
    with pytest.raises(ExportError, match="does not answer as the trained model"):
        export_adapter(base, attached(base), "mlx", tmp_path / "out", type="float32")
    assert list(tmp_path.iterdir()) == []


@needs_mlx
def test_mlx_lm_refuses_layers_that_it_calls_otherwise(
    base: addenda.LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FORMAT.write

    def renamed(job: Job, folder: Path) -> None:
        write(job, folder)
        altered(
            folder,
            lambda tensors: tensors.update({"model.layers.0.attn.wq.lora_a": tensors.pop(f"{Q0}.lora_a")}),
        )

    monkeypatch.setattr(FORMAT, "write", renamed)
    monkeypatch.setattr(type(FORMAT), "audit", lambda *_: [])
    with pytest.raises(ExportError, match="mlx-lm cannot load"):
        export_adapter(base, attached(base), "mlx", tmp_path / "out", type="adapter")
