"""The registry of export formats, and what is said of a plan before anything is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import addenda
from addenda.core import Method, registry
from addenda.errors import ConfigError, ExportError, MethodError, NotFoundError, TargetError
from addenda.export.format import Format, format_of, require_formats
from addenda.export.job import Job
from addenda.export.names import format_names, format_summaries
from addenda.export.probes import Probes
from addenda.export.run import export_adapter
from addenda.settings import resolve


@pytest.fixture
def base() -> Any:
    """A small model as a base; only its layers are looked at."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return SimpleNamespace(model=model, name="tiny", kind="encoder", weights="dense")


@pytest.mark.parametrize("name", format_names())
def test_a_format_is_a_file_that_says_what_it_is(name: str) -> None:
    assert isinstance(format_of(name), Format)
    assert format_summaries()[name].endswith(".")


def test_an_unknown_format_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="did you mean 'merged'") as caught:
        format_of("merge")
    assert "peft" in caught.value.hint
    with pytest.raises(ConfigError, match="no export format 'onix'") as caught:
        resolve(sets=["train.export_to=peft,onix"])
    assert "merged" in str(caught.value)


def test_a_recipe_takes_names_in_any_spelling() -> None:
    for spelled in ("peft,merged", "peft, merged", '["peft", "merged"]'):
        recipe = resolve(sets=[f"train.export_to={spelled}"])
        assert recipe.train.export_to == ("peft", "merged")
    assert 'export_to = ["peft", "merged"]' in recipe.to_toml()
    assert resolve().train.export_to == ()


def test_what_a_format_cannot_carry_is_said_with_the_formats_that_can(base: Any) -> None:
    planned = addenda.plan(base.model, registry.get("oft")(block_size=8))
    require_formats(["peft", "merged"], planned, base.model, base)
    with pytest.raises(ConfigError, match="cannot be exported as merged") as caught:
        require_formats(
            ["peft", "merged"], addenda.plan(base.model, registry.get("prefix-tuning")()), base.model, base
        )
    assert "method 'prefix-tuning' cannot be merged" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be exported as peft, merged") as caught:
        require_formats(
            ["peft", "merged"], addenda.plan(base.model, registry.get("reft")()), base.model, base
        )
    assert caught.value.hint.endswith("can carry it")
    assert not {"peft,", "merged,"} & set(caught.value.hint.split())


def test_layers_without_a_form_are_named(base: Any) -> None:
    planned = addenda.plan(base.model, registry.get("oft")(block_size=8, whole=("norm",)))
    assert format_of("peft").problems(planned, base.model, base) == []
    planned = addenda.plan(base.model, registry.get("vera")(), ["embed_tokens", "q_proj"])
    [problem] = format_of("peft").problems(planned, base.model, base)
    assert "no form for 1 of the layers, first 'model.embed_tokens'" in problem
    with pytest.raises(ConfigError) as caught:
        require_formats(["peft"], planned, base.model, base)
    assert "merged" in caught.value.hint


@pytest.mark.parametrize("name", registry.names())
def test_what_is_said_beforehand_is_what_writing_says(name: str, base: Any, tmp_path: Any) -> None:
    """A plan without a problem can be written for PEFT; one with a problem cannot."""
    from addenda.export.peft import write_peft

    cls = registry.get(name)
    for settings in cls.variants[:1]:
        method: Method = cls.from_settings(settings)
        try:
            planned = addenda.plan(base.model, method)
        except (MethodError, NotFoundError, TargetError):
            pytest.skip("it does not stand on this model by itself")
        handle = addenda.attach(base.model, method)
        problems = format_of("peft").problems(planned, base.model, base)
        if problems:
            with pytest.raises(ExportError):
                write_peft(handle, tmp_path)
        else:
            write_peft(handle, tmp_path)
            assert (tmp_path / "adapter_config.json").is_file()
        assert bool(format_of("merged").problems(planned, base.model, base)) == (not method.mergeable)


def test_a_type_is_one_of_those_that_a_format_writes(base: Any, tmp_path: Any) -> None:
    handle = addenda.attach(base.model, addenda.LoRA(rank=2))
    inputs = [{"input_ids": torch.arange(4, 12)[None]}]
    with pytest.raises(
        ConfigError, match=r"takes one of float32, bfloat16, float16, base, careful, not 'q9_9'"
    ):
        export_adapter(
            base.model, handle, "merged", tmp_path / "out", type="q9_9", inputs=inputs, kind="next-token"
        )
    with pytest.raises(ConfigError, match="takes no type, not 'float32'"):
        export_adapter(
            base.model, handle, "peft", tmp_path / "out", type="float32", inputs=inputs, kind="next-token"
        )
    with pytest.raises(ConfigError, match="nothing to prove the export on"):
        export_adapter(base.model, handle, "peft", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    handle.detach()


def test_an_adapter_with_broken_numbers_is_not_written(base: Any, tmp_path: Any) -> None:
    handle = addenda.attach(base.model, addenda.LoRA(rank=2))
    with torch.no_grad():
        next(handle.parameters())[0, 0] = float("nan")
    inputs = [{"input_ids": torch.arange(4, 12)[None]}]
    with pytest.raises(ExportError, match="not finite"):
        export_adapter(base.model, handle, "peft", tmp_path / "out", inputs=inputs, kind="next-token")
    assert not list(tmp_path.iterdir())
    handle.detach()


@pytest.mark.parametrize(("rank", "told"), [(4, 8), (12, 16), (16, 16)])
def test_a_folder_that_vllm_serves_says_how(rank: int, told: int, base: Any) -> None:
    handle = addenda.attach(base.model, addenda.LoRA(rank=rank), ["q_proj"], name="law")
    loaded = SimpleNamespace(name="theirs", source="org/theirs@abc")
    text = format_of("peft").usage(Job(base.model, handle, Probes((), "next-token"), loaded))
    assert f"vllm serve org/theirs --enable-lora --max-lora-rank {told}" in text
    assert "--lora-modules law=FOLDER" in text
    assert "vllm" not in format_of("peft").usage(Job(base.model, handle, Probes((), "next-token"), None))
    handle.detach()
