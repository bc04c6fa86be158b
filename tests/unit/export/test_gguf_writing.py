"""What is written is what llama.cpp runs: the same answers, the same tokens, and what transformers reads back."""

from __future__ import annotations

import importlib.util
import random
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import tiny_causal
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from addenda.errors import ConfigError, ExportError
from addenda.export.gguf.tokenizer import tokenizer_keys
from addenda.export.gguf.writing import write_base, written_kinds
from addenda.export.runtimes.gelu_table import gelus_of, with_gelu_table
from addenda.export.runtimes.llama_cpp import LlamaCpp

tiny_config, tiny_model = tiny_causal.tiny_config, tiny_causal.tiny_model

installed = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed (extra 'llamacpp')"
)

CONTROL = ["<pad>", "<s>", "</s>"]
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
ROWS = 300
TEXT = (
    "The quick brown foxes' 12345 jumps weren't over 3.14 lazy dogs!!  Ünïcödé, 日本語 and 👍🏽.\n\n"
    "def f(x):\n\treturn x**2  # I'LL see\n\n\nfor i in range(10):\r\n    print(i, 'they've')\n"
)
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_2 = LLAMA_3.replace("{1,3}", "")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CAPITALS = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+@|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*@|\p{{N}}#"
CAPITALS += r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4O = CAPITALS.replace("@", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("#", "{1,3}")
TEKKEN = CAPITALS.replace("@", "").replace("#", "")


def by_expression(expression: str) -> Any:
    split = pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def in_gpt_2s_way(*before: Any) -> Any:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])


SPLITS = {
    "gpt-2": (in_gpt_2s_way(), False),
    "smollm": (in_gpt_2s_way(pre_tokenizers.Digits(individual_digits=True)), False),
    "qwen2": (by_expression(QWEN_2), False),
    "llama-bpe": (by_expression(LLAMA_3), True),
    "dbrx": (by_expression(LLAMA_3), False),
    "gpt-4o": (by_expression(GPT_4O), False),
    "tekken": (by_expression(TEKKEN), True),
}


def fast(backend: tokenizers.Tokenizer, *, begins: bool = False) -> transformers.PreTrainedTokenizerFast:
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def byte_level(splitting: Any = None, *, whole: bool = False, size: int = ROWS) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer = splitting or in_gpt_2s_way()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    return backend


def sentencepiece(*, prefix: bool, metaspace: bool = False, without: Any = None) -> tokenizers.Tokenizer:
    """Byte-pair encoding with a blank as a letter, all pairs of a piece merged at one rank, as SentencePiece does."""
    letters = sorted(set("▁" + TEXT.replace(" ", "▁")) - {"日", "👍"})
    pieces = [
        "▁▁",
        "th",
        "▁th",
        "the",
        "▁the",
        "he",
        "ow",
        "br",
        "row",
        "brow",
        "brown",
        "1▁",
        "in",
        "ing",
        "ö▁",
    ]
    control = [*CONTROL, "<unk>"]
    tokens = control + [f"<0x{byte:02X}>" for byte in range(256)] + letters + pieces
    vocabulary = {token: place for place, token in enumerate(tokens)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary and (piece[:cut], piece[cut:]) != without
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first" if prefix else "never", split=False
        )
    else:
        blanks = [normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + blanks)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens(control)
    return backend


def base_of(model: Any, tokenizer: Any = None, **facts: Any) -> Any:
    """What `write_base` needs of a loaded base."""
    shared = {"name": "tiny", "license": "mit", "chat_template": TEMPLATE}
    return SimpleNamespace(model=model, tokenizer=tokenizer or fast(byte_level()), **{**shared, **facts})


def assert_answers_alike(
    model: Any, file: Any, lengths: tuple[int, ...] = (21, 9, 8, 7, 6, 1), within: float = 1e-4
) -> None:
    tokens = torch.randint(3, ROWS, (1, max(lengths)))
    tokens[0, 0] = 5  # which the runtime has the server write: half a letter would not be told
    with LlamaCpp(file, exact=True, context=max(lengths) + 8, vocabulary=ROWS) as runtime:
        for length in lengths:
            expected = model(tokens[:, :length]).logits[0, -1].log_softmax(0)
            found = runtime.next_token(tokens[0, :length].tolist(), ROWS)
            torch.testing.assert_close(found, expected, atol=within, rtol=0)


@installed
@pytest.mark.parametrize("family", tiny_causal.FAMILIES)
def test_llama_cpp_answers_as_transformers_does(family, tmp_path):
    model = tiny_model(family)
    write_base(base_of(model), tmp_path / "model.gguf")
    # A sum that differs by its last bit may fall on another number of the table.
    within = 1e-3 if gelus_of(model) else 1e-4
    with with_gelu_table(model):
        assert_answers_alike(model, tmp_path / "model.gguf", within=within)


STRETCHED = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@installed
@pytest.mark.parametrize("kind", STRETCHED)
def test_stretched_positions_are_carried(kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": 500.0, **STRETCHED[kind]}
    model = tiny_model("llama", rope_parameters=rope)
    write_base(base_of(model), tmp_path / "model.gguf")
    assert_answers_alike(model, tmp_path / "model.gguf", (30, 90))


@installed
def test_positions_of_windows_have_a_base_of_their_own(tmp_path):
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 77.0},
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3000.0},
    }
    model = tiny_model("gemma3_text", rope_parameters=rope)
    write_base(base_of(model), tmp_path / "model.gguf")
    assert gelus_of(model)
    with with_gelu_table(model):
        assert_answers_alike(model, tmp_path / "model.gguf", within=1e-3)


@installed
def test_a_part_of_each_head_is_rotated(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    model = tiny_model("phi3", rope_parameters=rope)
    write_base(base_of(model), tmp_path / "model.gguf")
    assert_answers_alike(model, tmp_path / "model.gguf")


@installed
@pytest.mark.parametrize(
    "settings", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}]
)
def test_tied_outputs_and_biases_are_carried(settings, tmp_path):
    model = tiny_model("llama", **settings)
    write_base(base_of(model), tmp_path / "model.gguf")
    assert_answers_alike(model, tmp_path / "model.gguf")


def odd_texts() -> list[str]:
    letters = "aZ 09\n\t.,'é日👍_-{}()\"<>|/\\ⅷ½"
    drawn = ["".join(random.choice(letters) for _ in range(random.randint(1, 40))) for _ in range(60)]
    return [
        TEXT,
        " a",
        "  a   b\n\n\n c\t\td",
        "a\r\nb\r\n\r\nc",
        "I'LL 'S don't",
        "HTTPServer iPhone",
        *drawn,
    ]


def assert_tokens_alike(tokenizer: Any, tmp_path: Any, texts: list[str]) -> None:
    model = tiny_model("llama", vocab_size=600)
    write_base(base_of(model, tokenizer), tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf", exact=True, context=64, vocabulary=600) as runtime:
        for text in texts:
            assert runtime.chat.begin(text) == tokenizer(text)["input_ids"], repr(text)


@installed
@pytest.mark.parametrize("name", SPLITS)
def test_each_known_splitting_makes_the_same_tokens(name, tmp_path):
    splitting, whole = SPLITS[name]
    tokenizer = fast(byte_level(splitting, whole=whole, size=400))
    assert tokenizer_keys(tokenizer, 600)["tokenizer.ggml.pre"] == name
    assert_tokens_alike(tokenizer, tmp_path, [*odd_texts(), "<s>a</s> b"])


@installed
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("metaspace", [True, False])
def test_pieces_with_scores_make_the_same_tokens(prefix, metaspace, tmp_path):
    tokenizer = fast(sentencepiece(prefix=prefix, metaspace=metaspace), begins=True)
    # Before a text that begins with a blank, Metaspace puts none; llama.cpp does.
    texts = [text for text in odd_texts() if not (metaspace and prefix and text.startswith(" "))]
    assert_tokens_alike(tokenizer, tmp_path, texts)


def test_tokenizers_that_llama_cpp_has_not_are_refused_before_anything_is_written(tmp_path):
    model = tiny_model("llama")
    for tokenizer in (
        byte_level(by_expression(r"\w+|\W")),
        byte_level(in_gpt_2s_way(pre_tokenizers.Whitespace())),
        tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    ):
        with pytest.raises(ExportError, match=r"no tokenizer like this one") as caught:
            write_base(base_of(model, fast(tokenizer)), tmp_path / "model.gguf")
        assert "SentencePiece" in str(caught.value)
        assert "smollm" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_pieces_that_merge_otherwise_than_by_scores_are_refused():
    backend = sentencepiece(prefix=True, without=("th", "e"))
    with pytest.raises(ExportError, match="'th' and 'e'"):
        tokenizer_keys(fast(backend), 600)


def test_transformers_reads_back_what_was_written(tmp_path):
    model = tiny_model("qwen2")
    write_base(base_of(model), tmp_path / "model.gguf")
    read = load_gguf_checkpoint(str(tmp_path / "model.gguf"), return_tensors=True, model_to_load=model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(read["tensors"][name], tensor, rtol=0, atol=0)
    config = read["config"]
    assert (config["hidden_size"], config["num_key_value_heads"], config["vocab_size"]) == (64, 2, ROWS)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["general.license"].contents() == "mit"
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_matrices_are_rounded_to_the_kind_and_nothing_else_is(kind, tmp_path):
    model = tiny_model(
        "mistral"
    )  # heads of 24: the rows of one matrix are whole blocks of 32, with 16 as well
    write_base(base_of(model), tmp_path / "exact.gguf")
    write_base(base_of(model), tmp_path / "rounded.gguf", kind=kind)
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "exact.gguf").tensors}
    for tensor in gguf.GGUFReader(tmp_path / "rounded.gguf").tensors:
        matrix = len(tensor.shape) > 1
        assert tensor.tensor_type.name == (kind if matrix else "F32"), tensor.name
        kept = gguf.quants.quantize(exact[tensor.name].data, tensor.tensor_type)  # by another hand
        assert (kept == tensor.data).all(), tensor.name


def test_other_tensors_are_written_in_place_of_the_models(tmp_path):
    model = tiny_model("llama")
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    write_base(base_of(model), tmp_path / "given.gguf", state=changed)
    model.load_state_dict(changed)
    write_base(base_of(model), tmp_path / "own.gguf")
    assert (tmp_path / "given.gguf").read_bytes() == (tmp_path / "own.gguf").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    model = tiny_model("llama")
    target = tmp_path / "model.gguf"
    target.write_bytes(b"old")
    shapes = model.state_dict()
    broken = {**shapes, "model.layers.0.self_attn.rotary.extra": torch.ones(3)}
    with pytest.raises(ExportError, match=r"no place for 'model\.layers\.0\.self_attn\.rotary\.extra'"):
        write_base(base_of(model), target, state=broken)
    with pytest.raises(ConfigError, match="Q9_9"):
        write_base(base_of(model), target, kind="Q9_9")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]
    assert target.read_bytes() == b"old"


def test_tokens_beyond_the_models_rows_are_refused():
    with pytest.raises(ExportError, match="no row"):
        tokenizer_keys(fast(byte_level()), ROWS - 1)


def test_progress_comes_to_its_end(tmp_path):
    seen: list[Any] = []
    write_base(base_of(tiny_model("gpt2")), tmp_path / "model.gguf", on_progress=seen.append)
    done = [step.done for step in seen]
    assert done == sorted(set(done))
    assert done[-1] == seen[-1].total


def test_every_kind_can_be_written(tmp_path):
    config = tiny_config("llama", hidden_size=256, intermediate_size=256)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for kind in written_kinds():
        write_base(base_of(model), tmp_path / f"{kind}.gguf", kind=kind)
        kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
        assert kinds == {"F32", kind}
