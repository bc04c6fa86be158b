"""Adapters on an embedding and an output head that share a weight: they part in the file, or it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_gguf_lora as lora
import test_gguf_made as made
import test_gguf_merged as merged
import torch
from safetensors.torch import load_file, save_file

import addenda
from addenda.bases import load_base
from addenda.bases.gguf_ways import Way
from addenda.errors import ConfigError, ExportError
from addenda.export.format import format_of, require_formats
from addenda.export.gguf.copying import write_like
from addenda.export.gguf.merging import audit_merged, write_merged_gguf
from addenda.export.gguf.origin import HEAD, dense, origin_of
from addenda.export.job import Job
from addenda.export.merged import write_merged
from addenda.export.own import OwnTensors
from addenda.export.probes import probes_of
from addenda.export.run import export_adapter

pytestmark = pytest.mark.usefixtures("shared_home")
installed = lora.installed
ENDS = EMBEDDING_PATH, HEAD_PATH = "model.embed_tokens", "lm_head"
EMBEDDING = "token_embd.weight"


def tied(folder: Path, family: str) -> addenda.LoadedBase:
    with pytest.MonkeyPatch.context() as patch:
        model = made.tiny_causal.tiny_model
        patch.setattr(made.tiny_causal, "tiny_model", lambda name: model(name, tie_word_embeddings=True))
        return load_base(made.saved(folder, family))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> addenda.LoadedBase:
    return tied(tmp_path_factory.mktemp("tied"), "llama")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> addenda.LoadedBase:
    """From a GGUF file, its weights as they are packed there: head and embedding share their bytes."""
    root = tmp_path_factory.mktemp("packed")
    config = made.transformers.LlamaConfig(**{**lora.tiny_gguf.LLAMA, "initializer_range": 0.15})
    model = made.transformers.LlamaForCausalLM(config).eval()
    path = lora.tiny_gguf.write_gguf(root / "tiny.gguf", model, quantize=["Q8_0"])
    return load_base(path, cache_dir=root / "cache", weights="packed")


Adapt = Callable[..., addenda.Handle]


@pytest.fixture
def adapt() -> Iterator[Adapt]:
    handles: list[addenda.Handle] = []

    def attach(base: addenda.LoadedBase, targets: Any) -> addenda.Handle:
        handles.append(lora.adapted(base, addenda.LoRA(rank=4, alpha=6.0), list(targets)))
        return handles[-1]

    yield attach
    for handle in handles:
        handle.detach()


def job_of(base: addenda.LoadedBase, handle: addenda.Handle) -> Job:
    return Job(base.model, handle, probes_of(base), base)


# ---------------------------------------------------------------------------------------------------------- proven


@installed
@pytest.mark.parametrize(
    ("to", "kind", "targets"),
    [
        ("gguf", "base", [HEAD_PATH]),
        ("gguf", "base+q8_0", [EMBEDDING_PATH]),
        ("gguf", "q8_0", [*ENDS, "q_proj"]),
        ("merged", "float32", [HEAD_PATH]),
        ("merged", "bfloat16", [*ENDS, "q_proj"]),
        ("merged", "float32", [EMBEDDING_PATH]),
    ],
)
def test_the_ends_part_and_answer_as_trained(
    to: str, kind: str, targets: list[str], base: addenda.LoadedBase, adapt: Adapt, tmp_path: Path
) -> None:
    parity = export_adapter(base, adapt(base, targets), to, tmp_path / "out", type=kind)
    assert parity.verdict == "passed"
    assert parity.twin.largest_difference < 1e-3 < parity.effect / 20
    assert base.model.config.tie_word_embeddings
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight


@installed
@pytest.mark.parametrize(("to", "kind"), [("gguf", "base"), ("gguf", "f32"), ("merged", "float32")])
def test_a_packed_head_parts_from_its_embedding(
    to: str, kind: str, packed: addenda.LoadedBase, adapt: Adapt, tmp_path: Path
) -> None:
    parity = export_adapter(packed, adapt(packed, [HEAD_PATH]), to, tmp_path / "out", type=kind)
    assert parity.verdict == "passed"


@installed
def test_a_careful_merge_rounds_an_embedding_as_it_is(
    tmp_path: Path, packed: addenda.LoadedBase, adapt: Adapt
) -> None:
    """No input weighs its errors; beside it the head is rounded with care."""
    base = load_base(packed.source, cache_dir=tmp_path / "cache", weights="dense", dtype=torch.float32)
    rows = [{"input_ids": torch.randint(5, 90, (1, 60))} for _ in range(4)]
    handle = adapt(base, ENDS)
    parity = export_adapter(base, handle, "gguf", tmp_path / "out", type="careful", calibration=rows)
    assert parity.verdict == "passed"
    kind = origin_of(base).tensors[EMBEDDING].type
    rounded = merged.unpack(merged.pack(handle.folded(EMBEDDING_PATH)[0], kind, EMBEDDING), kind)
    found = merged.numbers(tmp_path / "out" / "model.gguf", EMBEDDING)
    assert torch.equal(found, rounded.reshape(found.shape))


@installed
@pytest.mark.parametrize("family", ["gemma3_text", "granite", "qwen3_moe"])
def test_other_families_part_as_well(family: str, adapt: Adapt, tmp_path: Path) -> None:
    base = tied(tmp_path / "base", family)
    parity = export_adapter(base, adapt(base, ENDS), "gguf", tmp_path / "out", type="f32")
    assert parity.verdict == "passed"


def test_what_no_adapter_stands_on_is_the_base_s(
    base: addenda.LoadedBase, adapt: Adapt, tmp_path: Path
) -> None:
    handle = adapt(base, [HEAD_PATH])
    write_merged_gguf(job_of(base, handle), origin_of(base), tmp_path / "model.gguf", "f32")
    own = dense(base.model, f"{EMBEDDING_PATH}.weight")
    assert torch.equal(merged.numbers(tmp_path / "model.gguf", EMBEDDING), own)
    assert torch.equal(merged.numbers(tmp_path / "model.gguf", HEAD), handle.folded(HEAD_PATH)[0])


# --------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("target", ENDS)
def test_an_adapter_s_file_cannot_carry_it_which_is_said_before_training(
    target: str, base: addenda.LoadedBase
) -> None:
    planned = addenda.plan(base.model, addenda.LoRA(rank=2), [target])
    with pytest.raises(
        ConfigError, match=f"'{target}' shares its weight.*takes an adapter for neither"
    ) as told:
        require_formats(["gguf-lora"], planned, base.model, base)
    assert "gguf, merged, mlx, onnx, peft can carry it" in str(told.value)


def test_a_family_without_a_head_of_its_own_is_refused_before_training(tmp_path: Path) -> None:
    base = tied(tmp_path, "gemma2")
    planned = addenda.plan(base.model, addenda.LoRA(rank=2), [HEAD_PATH])
    [problem] = format_of("gguf").problems(planned, base.model, base)
    assert "no output head of its own for models of type 'gemma2'" in problem
    assert format_of("merged").problems(planned, base.model, base) == []


# ------------------------------------------------------------------------------------------- broken on purpose


class Broken(merged.Broken):
    """A good file with tensors left out, or taken from the place of another."""

    def __init__(self, file: Path, change: Callable[..., Any], places: dict[str, str | None]) -> None:
        super().__init__(file, change)
        self.places = places

    def tensors_of(self, header: Any) -> Any:
        known = {each.name: each for each in header.tensors}
        wanted = {**{name: name for name in known}, **self.places}
        return tuple(replace(known[place], name=name) for name, place in wanted.items() if place)


def unchanged(tensor: str, rows: torch.Tensor, file: Any) -> None:
    return None


GGUF_FAULTS: dict[str, tuple[list[str], dict[str, str | None], str]] = {
    "head lost": ([HEAD_PATH], {HEAD: None}, f"tensor '{HEAD}' is missing"),
    "head without its adapter": (
        [HEAD_PATH],
        {HEAD: EMBEDDING},
        f"'{HEAD}' is the base's own, without the adapter",
    ),
    "embedding with the head's adapter": (
        [HEAD_PATH],
        {EMBEDDING: HEAD},
        f"'{EMBEDDING}' holds what belongs to '{HEAD}'",
    ),
    "head tied again": ([EMBEDDING_PATH], {HEAD: EMBEDDING}, f"'{HEAD}' holds what belongs to '{EMBEDDING}'"),
    "a head that should not be": (
        ["q_proj"],
        {HEAD: EMBEDDING},
        f"tensor '{HEAD}' is there and should not be",
    ),
}


@pytest.mark.parametrize("fault", GGUF_FAULTS)
def test_a_broken_gguf_file_is_named(
    fault: str, base: addenda.LoadedBase, adapt: Adapt, tmp_path: Path
) -> None:
    targets, places, text = GGUF_FAULTS[fault]
    origin, good, job = origin_of(base), tmp_path / "good.gguf", job_of(base, adapt(base, targets))
    write_merged_gguf(job, origin, good, "base")
    assert audit_merged(job, origin, good, "base") == []
    write_like(good, tmp_path / "bad.gguf", Broken(good, unchanged, places))
    assert text in "; ".join(audit_merged(job, origin, tmp_path / "bad.gguf", "base"))


Tensors = dict[str, torch.Tensor]
HEAD_KEY, EMBEDDING_KEY = f"{HEAD_PATH}.weight", f"{EMBEDDING_PATH}.weight"


def placed(key: str, other: str) -> Callable[[Tensors, dict[str, Any]], None]:
    return lambda tensors, config: tensors.update({key: tensors[other].clone()})


FOLDER_FAULTS: dict[str, tuple[list[str], Callable[[Tensors, dict[str, Any]], Any], str]] = {
    "head lost": ([HEAD_PATH], lambda tensors, config: tensors.pop(HEAD_KEY), f"'{HEAD_KEY}' is missing"),
    "config ties them again": (
        [HEAD_PATH],
        lambda tensors, config: config.update(tie_word_embeddings=True),
        "config.json says tie_word_embeddings is True",
    ),
    "head without its adapter": (
        [HEAD_PATH],
        placed(HEAD_KEY, EMBEDDING_KEY),
        f"'{HEAD_PATH}' does not hold its weights with the adapter folded in",
    ),
    "head tied again": (
        [EMBEDDING_PATH],
        placed(HEAD_KEY, EMBEDDING_KEY),
        f"'{HEAD_PATH}' does not hold the base's weight",
    ),
    "a head that should not be": (
        ["q_proj"],
        lambda tensors, config: tensors.update({HEAD_KEY: tensors[EMBEDDING_KEY] + 1}),
        f"'{HEAD_KEY}' is there and should not be",
    ),
    "config parts them": (
        ["q_proj"],
        lambda tensors, config: config.update(tie_word_embeddings=False),
        "config.json says tie_word_embeddings is False",
    ),
}


@pytest.mark.parametrize("fault", FOLDER_FAULTS)
def test_a_broken_folder_is_named(fault: str, base: addenda.LoadedBase, adapt: Adapt, tmp_path: Path) -> None:
    targets, change, text = FOLDER_FAULTS[fault]
    handle, form = adapt(base, targets), format_of("merged")
    job = replace(job_of(base, handle), type="float32")
    write_merged(base, handle, tmp_path, torch.float32)
    assert form.audit(job, tmp_path) == []
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())
    change(tensors, settings)
    save_file(tensors, weights, {"format": "pt"})
    config.write_text(json.dumps(settings))
    assert text in "; ".join(form.audit(job, tmp_path))


@installed
@pytest.mark.parametrize("to", ["gguf", "merged"])
def test_where_writer_and_reader_take_both_for_one_the_answers_show_it(
    to: str, base: addenda.LoadedBase, adapt: Adapt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = adapt(base, [HEAD_PATH])

    def shared(job: Job, origin: Any) -> Any:
        """The head's weight is the embedding's, with the head's adapter folded in."""
        ways = {key: way for key, way in origin.ways.items() if key != EMBEDDING_KEY}
        return replace(origin, ways={**ways, HEAD_KEY: Way(EMBEDDING, None)})

    made = OwnTensors.__getitem__

    def both(self: OwnTensors, name: str) -> torch.Tensor:
        return handle.folded(HEAD_PATH)[0] if name == EMBEDDING_KEY else made(self, name)

    monkeypatch.setattr("addenda.export.gguf.merging._with_ends", shared)
    monkeypatch.setattr("addenda.export.own.OwnTensors.__getitem__", both)
    monkeypatch.setattr("addenda.export.formats.merged.merged_audit", lambda *given: [])
    with pytest.raises(ExportError, match="an answer differs by"):
        export_adapter(base, handle, to, tmp_path / "out", allow_drift=True)
    assert not list(tmp_path.iterdir())
