from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from torch import nn

import addenda
from addenda.bases.generate import generate, prompt_ids
from addenda.bases.loaded import LoadedBase
from addenda.core import registry
from addenda.data.encode import encode
from addenda.data.rows import Conversation, Example, Message, RowRef
from addenda.errors import BaseModelError, ConfigError

WORDS = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<end>", *"abcdefghijklmnopqrstuvwxyz .~"]
TEMPLATE = (
    "<s>{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer():
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, [], unk_token="~"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = Fuse()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<user>", "<assistant>", "<end>"],
    )
    made.chat_template = TEMPLATE
    return made


def base(**changes):
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    # Special tokens are never likely, so answers have text in them.
    model.lm_head.weight.data[:6] = 0
    fields = {
        "name": "tiny",
        "source": "made here",
        "folder": Path(),
        "model": model,
        "tokenizer": tokenizer(),
        "kind": "causal-lm",
        "chat_template": TEMPLATE,
        "template_sha256": "",
        "tokenizer_sha256": "",
        "context_length": 64,
        "license": "none",
    }
    return LoadedBase(**(fields | changes))


def talk(*texts):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def greedy_by_hand(base, messages, count, stops=(2, 5)):
    """The definition: whole forward for each token, the likeliest one appended."""
    ids = base.tokenizer(
        base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        add_special_tokens=False,
    )["input_ids"]
    new = []
    while len(new) < count:
        token = int(base.model(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return base.tokenizer.decode(new, skip_special_tokens=True)


TALKS = [talk("hello"), talk("a b c", "d", "e f g h i"), talk("z"), talk("what is it")]


def test_greedy_answers_equal_the_likeliest_token_each_time():
    made = base()
    answers = generate(made, TALKS, max_new_tokens=12)
    assert answers == [greedy_by_hand(made, messages, 12) for messages in TALKS]
    assert all(answers)
    assert answers == [generate(made, [messages], max_new_tokens=12)[0] for messages in TALKS]


def test_more_conversations_than_a_batch_keep_their_order(monkeypatch):
    made = base()
    monkeypatch.setattr("addenda.bases.generate.BATCH", 3)
    assert generate(made, TALKS * 2, max_new_tokens=6) == generate(made, TALKS, max_new_tokens=6) * 2


def test_an_answer_ends_where_the_template_ends_the_turn():
    made = base()
    (whole,) = generate(made, [talk("hello")], max_new_tokens=10)
    # Make <end> win from the fourth token on: no stop id but the template names it.
    forward, calls = made.model.forward, []

    def ending(*args, **kwargs):
        out = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) > 3:
            out.logits[..., 5] = 1e9
        return out

    made.model.forward = ending
    (short,) = generate(made, [talk("hello")], max_new_tokens=10)
    assert len(calls) == 4
    assert short == whole[:3]


def test_sampling_follows_its_seed_and_leaves_the_callers_random_numbers_alone():
    made = base()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = generate(made, TALKS, temperature=2.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert generate(made, TALKS, temperature=2.0, seed=1) == first
    assert generate(made, TALKS, temperature=2.0, seed=2) != first
    assert generate(made, TALKS, temperature=1e-4, max_new_tokens=8) == generate(
        made, TALKS, max_new_tokens=8
    )


def test_streamed_pieces_add_up_to_the_answer():
    made, pieces = base(), []
    (answer,) = generate(made, [TALKS[0]], max_new_tokens=20, on_token=pieces.append)
    assert "".join(pieces) == answer
    assert all(pieces)


def test_modes_are_put_back_and_dropout_is_off():
    made = base()
    made.model.model.layers[0].train()
    modes = [m.training for m in made.model.modules()]
    seen = []
    made.model.register_forward_pre_hook(lambda m, _: seen.append(any(x.training for x in m.modules())))
    generate(made, [TALKS[0]], max_new_tokens=3)
    assert seen
    assert not any(seen)
    assert [m.training for m in made.model.modules()] == modes


def test_the_models_own_decoding_defaults_do_not_slip_in():
    made = base()
    plain = generate(made, TALKS, max_new_tokens=15)
    made.model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=9.0
    )
    assert generate(made, TALKS, max_new_tokens=15) == plain


def test_an_answer_stops_at_the_end_of_the_context():
    made = base(context_length=14)
    (answer,) = generate(made, [talk("abc")], max_new_tokens=50)
    prompt = ["<s>", "<user>", "a", "b", "c", "<end>", "<assistant>"]
    assert len(answer) == 14 - len(prompt)


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning"])
def test_what_stands_in_front_of_a_conversation_takes_part_and_takes_room(name):
    made, talks = base(context_length=14), [talk("z"), talk("ab")]
    before = generate(made, talks, max_new_tokens=3)
    handle = addenda.attach(made.model, registry.get(name)(tokens=4))
    assert made.room == 10
    answers = generate(made, talks, max_new_tokens=3)
    assert answers == [greedy_by_hand(made, messages, 3) for messages in talks]
    (cut,) = generate(made, [talk("abc")], max_new_tokens=50)
    assert len(cut) == 10 - 7
    handle.disable()
    assert made.room == 14
    assert generate(made, talks, max_new_tokens=3) == before


def test_a_mixture_that_looks_ahead_answers_a_batch_as_each_conversation_alone():
    made, talks = base(), [talk("z"), talk("abc"), talk("ab")]
    before = generate(made, talks, max_new_tokens=6)
    for seed, name in enumerate(("law", "style")):
        handle = addenda.attach(made.model, addenda.LoRA(rank=4), name=name, seed=seed)
        with torch.no_grad():
            for parameter in handle.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    method = registry.get("xlora")(of=("law", "style"), hidden_size=made.model.config.hidden_size)
    addenda.attach(made.model, method, name="mix")
    answers = generate(made, talks, max_new_tokens=6)
    assert answers == [greedy_by_hand(made, messages, 6) for messages in talks]
    assert answers != before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -0.5}, "temperature must be 0 or more and finite, got -0.5"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"on_token": print}, "on_token follows one conversation, got 4"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        generate(base(), TALKS, **settings)


def test_what_cannot_answer_says_so():
    with pytest.raises(BaseModelError, match="encoder"):
        generate(base(kind="encoder"), TALKS)
    with pytest.raises(BaseModelError, match="no room for an answer") as caught:
        generate(base(context_length=8), [talk("a"), talk("much too long")])
    assert caught.value.where["conversations"] == "1"


@pytest.mark.parametrize("text", ["hello", "a</s>b", "<end><assistant>yes", "<s>", " </s> <pad>"])
def test_a_prompt_has_the_ids_that_training_gave_it_and_no_control_token_of_the_user(text):
    tiny = base()
    messages = talk(text, "fine", text)
    ids = prompt_ids(tiny, messages)
    turns = tuple(
        Message(m["role"], m["content"]) for m in (*messages, {"role": "assistant", "content": "ok"})
    )
    trained = encode(Conversation(turns, RowRef("", 1, 0)), tiny.tokenizer, chat_template=TEMPLATE)
    assert isinstance(trained, Example)
    assert tuple(ids) == trained.input_ids[: len(ids)]
    written = [WORDS[i] for i in ids if WORDS[i].startswith("<")]
    assert written == ["<s>", "<user>", "<end>", "<assistant>", "<end>", "<user>", "<end>", "<assistant>"]
