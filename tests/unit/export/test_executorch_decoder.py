"""A decoder in ExecuTorch goes on from its cache as the model does from the whole, and tells runners what it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import addenda
from addenda.bases.stepwise import StaticDecoder, keeps_keys
from addenda.errors import ConfigError, ExportError
from addenda.export.formats.executorch import FILE
from addenda.export.run import export_adapter

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="ExecuTorch is not installed: make test-edge"
)
TINY = {"vocab_size": 90, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **TINY, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=64
    )
    return transformers.LlamaForCausalLM(config).eval()


def gemma() -> nn.Module:
    """Layers that attend to the last 8 tokens among others, soft caps, and a tied head."""
    config = transformers.Gemma2Config(
        **TINY, num_hidden_layers=2, num_key_value_heads=1, head_dim=8, sliding_window=8
    )
    config.layer_types = ["sliding_attention", "full_attention"]
    return transformers.Gemma2ForCausalLM(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def mamba() -> nn.Module:
    config = transformers.MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=1, state_size=4)
    return transformers.MambaForCausalLM(config).eval()


def adapted(model: nn.Module) -> addenda.Handle:
    handle = addenda.attach(model, addenda.LoRA(rank=2), "all-linear", seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.3)
    return handle


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.randint(5, 90, (1, n))} for n in (12, 25, 1)]


@pytest.mark.parametrize("make", [llama, gemma, gpt2])
def test_parts_of_a_sequence_give_what_the_whole_gives(make: type) -> None:
    model = make()
    decoder, ids = StaticDecoder(model, 40), torch.randint(5, 90, (30,))
    with torch.no_grad():
        for cuts in ([7, 1, 12, 1, 1], [3, 2, 20, 5]):  # the second begins anew, over what the first has left
            read, wanted = 0, model(input_ids=ids[None]).logits[0]
            for piece in ids[: sum(cuts)].split(cuts):
                found = decoder(piece[None], torch.arange(read, read + len(piece)))
                read += len(piece)
                torch.testing.assert_close(found[0, 0], wanted[read - 1], rtol=1e-4, atol=1e-5)


def test_which_models_keep_a_key_for_each_token() -> None:
    assert all(keeps_keys(make()) for make in (llama, gemma, gpt2))
    assert not keeps_keys(mamba())


@needs_executorch
def test_a_program_answers_from_its_cache_and_tells_what_it_is(tmp_path: Path) -> None:
    from addenda.export.runtimes.executorch import Decoder, Program

    model = llama()
    handle, before = adapted(model), model.config._attn_implementation
    parity = export_adapter(
        model, handle, "executorch", tmp_path / "out", inputs=rows(), kind="next-token", context=40
    )
    assert parity.verdict == "passed", parity
    assert model.config._attn_implementation == before
    program, ids = Program(tmp_path / "out" / FILE), torch.randint(5, 90, (40,))
    with torch.no_grad():
        wanted = model(input_ids=ids[None]).logits[0]
    for cuts in ([40], [1, 30, 1, 1, 7]):
        decoder = Decoder(program)
        for piece in ids.split(cuts):
            found = decoder.read(piece)
            torch.testing.assert_close(found, wanted[decoder.length - 1], rtol=1e-4, atol=1e-4)
    with pytest.raises(ExportError, match="cannot run"):
        Decoder(program).read(torch.randint(5, 90, (41,)))
    told = program.told()
    assert told["get_max_context_len"] == told["get_max_seq_len"] == [40]
    assert told["get_vocab_size"] == [90]
    assert told["use_kv_cache"] == told["enable_dynamic_shape"] == [True]
    assert "(1, n)" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@needs_executorch
def test_a_decoder_in_eight_bits_keeps_what_was_trained(tmp_path: Path) -> None:
    model = llama()
    handle = adapted(model)
    parity = export_adapter(
        model, handle, "executorch", tmp_path / "out", type="int8", inputs=rows(), kind="next-token"
    )
    assert parity.verdict == "passed", parity
    assert parity.real.largest_difference > parity.twin.largest_difference


@needs_executorch
def test_a_cache_that_was_not_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from addenda.bases import stepwise

    def forgetful(self: stepwise._Kept, keys: torch.Tensor, values: torch.Tensor, *rest: object) -> object:
        torch.ops.aten.index_put_(self.keys, [None, None, self.places], keys)
        return self.keys, self.values

    monkeypatch.setattr(stepwise._Kept, "update", forgetful)
    model = llama()
    handle = adapted(model)
    with pytest.raises(ExportError, match="does not answer as the trained model"):
        export_adapter(model, handle, "executorch", tmp_path / "out", inputs=rows(), kind="next-token")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "context"), [("peft", 40), ("executorch", 1)])
def test_a_context_that_cannot_be_is_refused(to: str, context: int, tmp_path: Path) -> None:
    model = llama()
    handle = adapted(model)
    with pytest.raises(ConfigError, match="context"):
        export_adapter(model, handle, to, tmp_path / "out", inputs=rows(), kind="next-token", context=context)
    assert list(tmp_path.iterdir()) == []
