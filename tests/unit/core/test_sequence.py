"""The second contract: what a prompt, a prefix and added attention are asked for, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import addenda
from addenda.bases.packed import PackedModel
from addenda.core import registry
from addenda.core.composition import Rows, Sum
from addenda.errors import ConfigError, MethodError, TargetError

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.2, **SIZES
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 67, (3, 8))


def method(name: str, **settings: object) -> addenda.Method:
    return registry.get(name)(**settings)


def test_each_sample_may_have_a_task_of_its_own(model: nn.Module, ids: Tensor) -> None:
    handle = addenda.attach(model, method("multitask-prompt-tuning", tokens=3, tasks=4, task=2))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(torch.randn_like(parameter))
    tasks = torch.tensor([2, 0, 3])
    together = model(ids, task_ids=tasks).logits
    for row, task in enumerate(tasks):
        alone = model(ids[row : row + 1], task_ids=task[None]).logits
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[:1], model(ids[:1]).logits, rtol=1e-4, atol=1e-5)
    together.square().sum().backward()
    adapter = next(iter(handle.adapters.values()))
    used = adapter.U.grad.flatten(1).abs().sum(1) > 0
    assert used.tolist() == [True, False, True, True]


def test_added_attention_is_the_papers_formula(model: nn.Module, ids: Tensor) -> None:
    """Against the formula, written out in float64 head by head, with the layer's own rotary positions."""
    model = model.double()
    layer = model.model.layers[1].self_attn
    seen: dict[str, Tensor] = {}
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    handle = addenda.attach(model, method("llama-adapter", tokens=5, layers=1), probe=ids)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    [adapter] = handle.adapters.values()
    with handle.disabled():
        model(ids)
        plain = layer(**seen)[0]
    added = layer(**seen)[0] - plain
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    wanted = torch.zeros_like(added)
    for row in range(len(ids)):
        heads = []
        for head in range(4):
            rows = slice(8 * head, 8 * head + 8)
            shared = slice(8 * (head // 2), 8 * (head // 2) + 8)
            q = x[row] @ layer.q_proj.weight[rows].T
            q = q * cos[0] + torch.cat([-q[:, 4:], q[:, :4]], dim=1) * sin[0]
            k, v = adapter.P @ layer.k_proj.weight[shared].T, adapter.P @ layer.v_proj.weight[shared].T
            heads.append(adapter.gate * torch.softmax(q @ k.T / 8**0.5, dim=-1) @ v)
        wanted[row] = torch.cat(heads, dim=1) @ layer.o_proj.weight.T
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(added, wanted, rtol=1e-6, atol=1e-7)  # the softmax is taken in float32


def test_of_two_prompts_the_first_attached_stands_in_front(model: nn.Module, ids: Tensor) -> None:
    for name, start in (("first", (7, 8, 9)), ("second", (5, 6))):
        addenda.attach(model, method("prompt-tuning", tokens=len(start), start="text", ids=start), name=name)
    found = model(ids).logits
    for name in ("first", "second"):
        addenda.detach(model, name)
    front = torch.tensor([7, 8, 9, 5, 6]).expand(3, -1)
    wanted = model(torch.cat([front, ids], dim=1)).logits[:, 5:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["prompt-tuning", "prefix-tuning", "lora"])
@pytest.mark.parametrize("second", ["prompt-tuning", "prefix-tuning"])
def test_prompts_prefixes_and_layers_mix(first: str, second: str, model: nn.Module, ids: Tensor) -> None:
    made = method(first, rank=2) if first == "lora" else method(first, tokens=3)
    handle = addenda.attach(model, made, name="first")
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    addenda.attach(model, method(second, tokens=4), name="second")
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    so_far = ids
    for _ in range(5):
        so_far = torch.cat([so_far, model(so_far, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, so_far)


@pytest.mark.parametrize("composition", [Sum({"default": 0.5}), Rows(("default", None, None))])
def test_whole_transformers_compose_as_a_stack_only(
    composition: object, model: nn.Module, ids: Tensor
) -> None:
    addenda.attach(model, method("prompt-tuning", tokens=3))
    addenda.activate(model, composition)
    with pytest.raises(MethodError, match="cannot be composed") as caught:
        model(ids)
    assert "stacked" in caught.value.hint


def test_a_cache_of_a_fixed_size_is_refused(model: nn.Module, ids: Tensor) -> None:
    addenda.attach(model, method("prompt-tuning", tokens=3))
    with pytest.raises(MethodError, match=r"no room for virtual positions: .*fixed size"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2, do_sample=False)


def test_tokens_that_are_not_there_are_refused_by_the_plan(model: nn.Module) -> None:
    with pytest.raises(MethodError, match="the vocabulary ends at 66"):
        addenda.plan(model, method("prompt-tuning", start="text", ids=(3, 67)))
    for name in ("prefix-tuning", "cartridge"):
        with pytest.raises(MethodError, match="asks for the tokens of a text"):
            addenda.plan(model, method(name, start="text"))
    with pytest.raises(MethodError, match="asks for the tokens of a context"):
        addenda.plan(model, method("cpt"))


def test_settings_that_would_count_for_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="started from with start = 'text' only"):
        method("prompt-tuning", text="hello")
    with pytest.raises(ConfigError, match="roles must be as many as the context's 2 tokens"):
        method("cpt", ids=(3, 4), roles=(1, 2, 3))
    with pytest.raises(ConfigError, match="frozen must be less than tokens"):
        method("cartridge", tokens=3, frozen=3)
    with pytest.raises(ConfigError, match="task must be less than tasks"):
        method("multitask-prompt-tuning", tasks=2, task=2)


def test_a_model_without_a_transformer_in_it_is_refused() -> None:
    with pytest.raises(TargetError):
        addenda.plan(nn.Sequential(nn.Linear(4, 4)), method("prompt-tuning"))


def test_texts_become_tokens_and_take_room() -> None:
    made = method("cpt", text="abc").with_tokens(lambda text: [ord(each) for each in text])
    assert (made.ids, made.positions) == ((97, 98, 99), 3)
    assert method("prefix-tuning", tokens=7).positions == 7
    assert addenda.LoRA().positions == 0


@pytest.mark.parametrize("first", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("second", ["prompt-tuning", "prefix-tuning"])
def test_both_in_a_packed_row_are_both_on_each_sample(first: str, second: str, model: nn.Module) -> None:
    for place, name in enumerate((first, second)):
        addenda.attach(model, method(name, tokens=3 + place), name=f"adapter-{place}")
    packed = PackedModel(model)
    assert packed.path == "packed", packed.reason
    row = torch.randint(3, 67, (11,))
    alone = [packed.hidden_alone(sample) for sample in torch.split(row, [4, 7])]
    torch.testing.assert_close(packed.hidden(row, [4, 7]), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_among_pictures_a_prompt_stands_on_the_language_model() -> None:
    text = transformers.LlamaConfig(num_attention_heads=4, pad_token_id=0, **SIZES)
    sight = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=sight, image_token_index=66, image_seq_length=4
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 66, 66, 66, 66, 5, 6, 7]])
    before = model(ids, pixel_values=(pixels := torch.randn(1, 3, 16, 16))).logits
    for name in ("first", "second"):
        handle = addenda.attach(model, method("prompt-tuning", tokens=3), name=name)
        assert handle.paths == ["model.language_model"]
    found = model(ids, pixel_values=pixels).logits
    assert found.shape == before.shape
    assert not torch.allclose(found, before)
