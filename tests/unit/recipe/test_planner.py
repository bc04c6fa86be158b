"""How a base is held is chosen by what fits and what is soonest over; and what is named to make a run fit does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from addenda.bases.weights import Weights
from addenda.errors import BaseModelError, OutOfMemory
from addenda.recipe import planner
from addenda.recipe.bases import load_causal
from addenda.recipe.planner import Setup, choose_setup
from addenda.settings import Recipe, resolve
from addenda.train.forecast import RowSize

ROWS = [RowSize(300, 100)] * 20
SECONDS = {("dense", torch.float32): 1.0, ("packed", torch.float32): 1.2, ("dense", torch.bfloat16): 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chat model in Hugging Face layout, large enough that its weights count."""
    path = tmp_path_factory.mktemp("models") / "small"
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    backend = Tokenizer(models.BPE({chr(n): n - 32 for n in range(32, 127)}, []))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibrations() -> dict[tuple[str, torch.dtype], object]:
    return {}


def setup_of(
    folder: Path, monkeypatch: pytest.MonkeyPatch, calibrations, limit: int | None, *sets: str
) -> Setup:
    """Choose with real counts of memory, and with times that the table above makes up."""
    recipe = resolve(flags={"base.source": str(folder)}, sets=["train.batch_size=4", *sets])
    calibrate = planner.calibrate
    tried: list[tuple[str, torch.dtype]] = []

    def timed(model, planned, config, **options):
        key = ("packed" if any("raw" in name for name, _ in model.named_buffers()) else "dense", model.dtype)
        tried.append(key)
        if key not in calibrations:
            calibrations[key] = calibrate(model, planned, config, **(options | {"tokens": 256}))
        slower = SECONDS.get(key, 9.0)
        blocks = tuple(
            (
                count,
                dataclasses.replace(both, fixed=0.0, per_token=1e-3 * slower, per_pair=0.0),
                dataclasses.replace(forward, fixed=0.0, per_token=4e-4 * slower, per_pair=0.0),
            )
            for count, both, forward in calibrations[key].blocks
        )
        return dataclasses.replace(calibrations[key], blocks=blocks)

    def load(settings, dtype, **options):
        wanted: Weights = settings.weights
        if wanted == "packed":  # NF4 stands for the packed form that a folder of dense weights has not
            base = load_causal(dataclasses.replace(settings, weights="nf4"), dtype, **options)
            return dataclasses.replace(base, weights="packed")
        return load_causal(settings, dtype, **options)

    monkeypatch.setattr(planner, "calibrate", timed)
    monkeypatch.setattr(planner, "load_causal", load)
    monkeypatch.setattr(planner.psutil.Process, "memory_info", lambda _: type("Rss", (), {"rss": 10**6}))
    if limit is not None:
        monkeypatch.setattr(planner, "memory_limit", lambda *_, **__: limit)
    base = load(recipe.base, torch.float32, on_progress=None, weightless=True)
    setup = choose_setup(recipe, base, ROWS)
    setup_of.tried = tried  # type: ignore[attr-defined]
    return setup


def test_with_memory_enough_nothing_else_is_tried(folder, monkeypatch, calibrations) -> None:
    setup = setup_of(folder, monkeypatch, calibrations, 2**40)
    assert setup_of.tried == [("dense", torch.float32)]  # type: ignore[attr-defined]
    assert (setup.base.weights, setup.dtype) == ("dense", "float32")
    assert setup.forecast is not None
    assert setup.forecast.recompute == 0
    assert setup.document()["forecast"]["steps"] == 15


def test_where_blocks_would_run_again_the_sooner_form_is_taken(folder, monkeypatch, calibrations) -> None:
    plenty = setup_of(folder, monkeypatch, calibrations, 2**40)
    assert plenty.memory is not None
    # All but a byte of what dense weights need: packed ones fit with nothing run again.
    limit = plenty.memory.ledger(300).total - 1
    setup = setup_of(folder, monkeypatch, calibrations, limit)
    assert (setup.base.weights, setup.dtype) in {("packed", "float32"), ("dense", "float32")}
    assert ("packed", torch.float32) in setup_of.tried  # type: ignore[attr-defined]
    assert setup.forecast is not None
    assert setup.forecast.ledger.total <= limit
    assert "takes" in setup.reason
    monkeypatch.setitem(SECONDS, ("packed", torch.float32), 0.1)
    quick = setup_of(folder, monkeypatch, calibrations, limit)
    assert quick.base.weights == "packed"


def test_what_is_set_is_not_changed(folder, monkeypatch, calibrations) -> None:
    fixed = ("base.weights=dense", "base.dtype=float32")
    limit = setup_of(folder, monkeypatch, calibrations, 2**40).memory.ledger(300).total - 1
    setup_of(folder, monkeypatch, calibrations, limit, *fixed)
    assert set(setup_of.tried) == {("dense", torch.float32)}  # type: ignore[attr-defined]


def test_a_run_that_fits_in_no_form_names_settings_with_which_it_does(
    folder, monkeypatch, calibrations
) -> None:
    fixed = ["base.weights=dense", "base.dtype=float32"]
    memory = setup_of(folder, monkeypatch, calibrations, 2**40).memory
    assert memory is not None
    limit = memory.ledger(300, memory.blocks).total - 2**20
    with pytest.raises(OutOfMemory) as caught:
        setup_of(folder, monkeypatch, calibrations, limit, *fixed)
    error = caught.value
    assert error.exit_code == 5
    assert "activations" in str(error.where["needed at least"])
    named = re.findall(r"([a-z_.]+)=([\w.]+)", error.hint)
    keys = {key for key, _ in named}
    assert {"base.weights", "data.max_tokens", "train.memory_gib"} <= keys
    weights = dict(named)["base.weights"]
    packed = setup_of(
        folder, monkeypatch, calibrations, limit, f"base.weights={weights}", "base.dtype=float32"
    )
    assert packed.forecast is not None
    most = int(dict(named)["data.max_tokens"])
    assert 2 <= most < 300
    assert memory.ledger(most, memory.blocks).total <= limit


def test_a_model_that_cannot_be_cut_down_gets_no_forecast_but_a_reason(folder, monkeypatch) -> None:
    def refuse(*_, **__):
        raise ValueError("the model has no repeated blocks")

    monkeypatch.setattr(planner, "calibrate", refuse)
    recipe: Recipe = resolve(flags={"base.source": str(folder)})
    base = load_causal(recipe.base, torch.float32, on_progress=None, weightless=True)
    setup = choose_setup(recipe, base, ROWS)
    assert setup.forecast is None
    assert "no repeated blocks" in str(setup)


def test_an_encoder_is_refused_before_anything_is_timed(tmp_path: Path, folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    recipe = resolve(flags={"base.source": str(tmp_path)})
    with pytest.raises(BaseModelError, match="encoder"):
        load_causal(recipe.base, torch.float32, on_progress=None, weightless=True)
