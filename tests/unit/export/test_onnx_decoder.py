"""A decoder in an ONNX file goes on from its cache as the model does from the whole sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.bases.stepwise import cache_shapes
from addenda.errors import BaseModelError
from addenda.export.onnx.writing import FILE, decoder_graph, save
from addenda.export.run import export_adapter

pytest.importorskip("onnx_ir", reason="the extra 'onnx' is not installed")
from addenda.export.runtimes.onnxruntime import Decoder, Session

TINY = {"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**TINY, num_hidden_layers=2, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def gemma() -> nn.Module:
    """Layers that attend to the last 8 tokens among others, and a head that shares the embedding's weight."""
    config = transformers.Gemma3TextConfig(
        **TINY,
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        tie_word_embeddings=True,
    )
    config.layer_types = ["sliding_attention", "full_attention"]
    return transformers.Gemma3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Session]:
    torch.manual_seed(0)
    model, folder = llama(), tmp_path_factory.mktemp("written")
    save(decoder_graph(model), folder)
    return model, Session(folder / FILE)


def assert_pieces_answer_as_the_whole(model: nn.Module, session: Session) -> None:
    ids = torch.randint(5, 90, (26,))
    with torch.no_grad():
        wanted = model(input_ids=ids[None]).logits[0]
    decoder = Decoder(session)
    found = torch.cat([decoder.read(piece) for piece in ids.split([7, 1, 12, 1, 5])])
    assert torch.allclose(found, wanted, atol=1e-5)


def test_pieces_of_a_sequence_give_what_the_whole_gives(written: tuple[nn.Module, Session]) -> None:
    past = {f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")}
    assert {name for name in written[1].inputs if name.startswith("past")} == past
    assert written[1].outputs["present.1.value"][2] == "past + length"
    assert_pieces_answer_as_the_whole(*written)


@pytest.mark.slow
def test_windows_of_attention_and_tied_heads(tmp_path: Path) -> None:
    model = gemma()
    handle = addenda.attach(model, addenda.LoRA(rank=2), ["q_proj", "down_proj"], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.2)
    save(decoder_graph(model), tmp_path)
    assert_pieces_answer_as_the_whole(model, Session(tmp_path / FILE))


@pytest.mark.slow
def test_experts_with_adapters_are_chosen_for_each_token(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **TINY, num_hidden_layers=2, num_key_value_heads=2, num_local_experts=4
    )
    model = transformers.MixtralForCausalLM(config).eval()
    before = model.config._experts_implementation
    handle = addenda.attach(model, addenda.LoRA(rank=2), ["gate_up_proj", "down_proj"], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    rows = [{"input_ids": torch.randint(5, 90, (1, n))} for n in (12, 25)]
    parity = export_adapter(model, handle, "onnx", tmp_path / "out", inputs=rows, kind="next-token")
    assert parity.verdict == "passed"
    assert model.config._experts_implementation == before


@pytest.mark.slow
def test_a_decoder_in_whole_numbers_keeps_what_was_trained(tmp_path: Path) -> None:
    model = llama()
    handle = addenda.attach(model, addenda.LoRA(rank=2), ["q_proj", "v_proj", "up_proj"], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    rows = [{"input_ids": torch.randint(5, 90, (1, n))} for n in (12, 25)]
    parity = export_adapter(
        model, handle, "onnx", tmp_path / "out", type="int8", inputs=rows, kind="next-token"
    )
    assert parity.verdict == "passed"
    assert parity.real.largest_difference > parity.twin.largest_difference


def test_padding_in_front_is_not_attended_to(written: tuple[nn.Module, Session]) -> None:
    model, session = written
    ids = torch.randint(5, 90, (2, 6))
    empty = {name: torch.zeros(2, s[1], 0, s[3]) for name, s in session.inputs.items() if len(s) == 4}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    row = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    found = session.run({**row, **empty})["logits"]
    with torch.no_grad():
        assert torch.allclose(found[0, 2:], model(ids[:1, 2:]).logits[0], atol=1e-5)
        assert torch.allclose(found[1], model(ids[1:]).logits[0], atol=1e-5)


def test_greedy_answers_are_those_of_transformers(written: tuple[nn.Module, Session]) -> None:
    model, session = written
    ids = torch.randint(5, 90, (1, 6))
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:]
    answer = Decoder(session).answer(ids[0], stop=(), max_new_tokens=12)
    assert answer == wanted.tolist()
    cut = Decoder(session).answer(ids[0], stop={answer[4]}, max_new_tokens=12)
    assert cut == answer[: answer.index(answer[4])]


def test_keys_and_values_may_be_of_different_sizes() -> None:
    config = transformers.DeepseekV3Config(
        **TINY,
        num_hidden_layers=2,
        num_key_value_heads=4,
        first_k_dense_replace=2,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    )
    found = cache_shapes(transformers.DeepseekV3ForCausalLM(config).eval())
    assert found == [((1, 8), (1, 4))] * 2  # what is kept is compressed, and the rotated part


def test_a_model_without_such_a_cache_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(BaseModelError, match="keeps no key and value for each token"):
        cache_shapes(transformers.MambaForCausalLM(config).eval())
