"""A recipe whose adapters begin with what its own rows show: observed once, the same for a seed, not on resuming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import addenda.recipe.prepare as preparation
from addenda.core import Progress, read_manifest
from addenda.core.starts import get
from addenda.data import encode_rows
from addenda.errors import ConfigError
from addenda.recipe import encoder_for, prepare_base, prepare_data, run
from addenda.recipe.observing import observe_base
from addenda.settings import Recipe, resolve
from addenda.train.parallel import Parallel


def recipe_of(model: Path, rows: Path, out: Path | None, start: str, **more: object) -> Recipe:
    given = {
        "base.source": str(model),
        "base.dtype": "float32",
        "data.path": str(rows),
        "data.heldout_minimum": 4,
        "method.rank": 4,
        "method.start": start,
        "method.start_rows": 8,
        "train.max_steps": 3,
        "train.tokens_per_micro_batch": 128,
        "evals.samples": 0,
        **more,
    }
    return resolve(flags={**given, "out": None if out is None else str(out)})


def never(_: object) -> None:
    """Watch nothing."""


def saved(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "eva", "corda", "lora_ga"])
def test_a_run_begins_as_its_start_says_and_the_same_way_again(
    start: str, tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    told: list[object] = []
    for name in ("first", "second"):
        run(recipe_of(tiny_model, chat_rows, tmp_path / name, start), on_event=told.append)
    first, second = saved(tmp_path / "first"), saved(tmp_path / "second")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(key.endswith(".A0") for key in first) == get(start).moved
    assert read_manifest(tmp_path / "first" / "adapter")["settings"]["start"] == start
    observed = [event for event in told if isinstance(event, Progress) and event.task == "observe"]
    assert bool(observed) == (start != "pissa")
    assert all(event.done == event.total for event in observed[-1:])


def test_a_resumed_run_takes_its_values_from_the_checkpoint(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = recipe_of(tiny_model, chat_rows, parts, "corda", **{"train.save_every_steps": 1})
    run(recipe_of(tiny_model, chat_rows, whole, "corda"), on_event=never)

    def stop_at_two(event: object) -> None:
        if getattr(event, "step", 0) == 2 and type(event).__name__ == "StepEvent":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, on_event=stop_at_two)
    monkeypatch.setattr(get("corda"), "factors", None)
    monkeypatch.setattr(get("corda"), "observer", None)
    run(resolve(file=parts / "recipe.resolved.toml"), on_event=never, resume=True)
    ours, theirs = saved(parts), saved(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_ranks_that_the_rows_suggest_are_part_of_the_resolved_recipe(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    rho = {"method.start_settings": {"rho": 2.0}}
    run(recipe_of(tiny_model, chat_rows, tmp_path / "run", "eva", **rho), on_event=never)
    settled = resolve(file=tmp_path / "run" / "recipe.resolved.toml").method
    tensors = saved(tmp_path / "run")
    ranks = {key.removesuffix(".A"): len(value) for key, value in tensors.items() if key.endswith(".A")}
    assert ranks == {path: settled.rank_at(path) for path in ranks}
    assert len(set(ranks.values())) > 1
    assert max(ranks.values()) <= 8
    assert min(ranks.values()) >= 1
    assert sum(ranks.values()) <= 4 * len(ranks)


def test_loftq_compares_a_quantized_base_with_the_weights_it_came_from(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    run(
        recipe_of(tiny_model, chat_rows, tmp_path / "run", "loftq", **{"base.weights": "nf4"}), on_event=never
    )
    assert any(
        float(value.abs().max()) > 0 for key, value in saved(tmp_path / "run").items() if key.endswith(".B")
    )
    with pytest.raises(ConfigError, match="the base is dense"):
        run(
            recipe_of(tiny_model, chat_rows, tmp_path / "dense", "loftq", **{"base.weights": "dense"}),
            on_event=never,
        )


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_packed_rows_show_what_the_model_shows_row_by_row(
    start: str, tiny_model: Path, chat_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_model, chat_rows, None, start, **{"train.tokens_per_micro_batch": 4096})
    base = prepare_base(recipe.base, torch.float32, never)
    rows = encode_rows(prepare_data(recipe.data, never).conversations, encoder_for(base, recipe.data))
    found = observe_base(base, recipe, rows, never)
    assert found is not None
    path = "model.layers.1.mlp.up_proj"
    layer, examples = base.model.get_submodule(path), [rows.examples[index] for index in range(8)]
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0][0].detach()))
    layer.weight.requires_grad_(True)
    total = torch.zeros(())
    for example in examples:
        labels = torch.tensor(
            [[t if on else -100 for t, on in zip(example.input_ids, example.trained, strict=True)]]
        )
        logits = base.model(torch.tensor([example.input_ids])).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum")
    hook.remove()
    mean = total / sum(example.trained_tokens for example in examples)
    (gradient,) = torch.autograd.grad(mean, layer.weight)
    if start == "lora_ga":
        torch.testing.assert_close(found.layers[path]["gradient"], gradient, rtol=1e-3, atol=1e-6)
        return
    kept = torch.cat([x[torch.tensor(e.trained)] for x, e in zip(inputs, examples, strict=True)])
    kept = kept / kept.abs().max()
    torch.testing.assert_close(found.layers[path]["covariance"], kept.t() @ kept, rtol=1e-4, atol=1e-4)


def test_processes_beside_the_first_observe_nothing(
    tiny_model: Path, chat_rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Parallel):
        first = property(lambda self: False)

    monkeypatch.setattr(get("eva"), "observer", None)
    monkeypatch.setattr(preparation, "_settle", lambda recipe, rows, *_: (recipe, rows.precision, None))
    ready = preparation.prepare(recipe_of(tiny_model, chat_rows, None, "eva"), never, Second())
    assert ready.handle.paths
