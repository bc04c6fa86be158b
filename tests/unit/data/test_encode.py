"""The mask: what is trained on is what the assistant says and the token that ends it, and nothing else."""

from __future__ import annotations

import random
import time
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from addenda.data import Conversation, Encoder, Example, Finding, Message, RowRef, encode, encode_rows
from addenda.errors import ConfigError, DataError, UnsafeError

ROW = RowRef("data.jsonl", 3, 2)
STYLES = ["chatml", "default-system", "llama2", "llama3", "gemma", "thinking"]
WORDS = [
    "the",
    "order",
    "Hello",
    "12",
    "£",
    "naïve",
    "😀",
    "refund?",
    "a  b",
    "x\ny",
    "\n\n",
    "user",
    "[INST]",
    "—",
    "\t",
]


def text_of(rng: random.Random) -> str:
    """Some words; it begins and ends with a letter, because several templates strip contents."""
    return "a" + " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + "z"


def chat(rng: random.Random, *, system: bool = False, answers: int = 0, **fields: object) -> Conversation:
    turns = [Message("system", text_of(rng))] if system else []
    for _ in range(answers or rng.randint(1, 4)):
        turns += [Message("user", text_of(rng)), Message("assistant", text_of(rng), **fields)]
    return Conversation(tuple(turns), ROW)


def trained_runs(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each unbroken run of trained tokens, read off the decoded whole."""
    runs, ids, start = [], list(example.input_ids), None
    for i, on in enumerate([*example.trained, False]):
        if on and start is None:
            start = i
        elif not on and start is not None:
            runs.append(tokenizer.decode(ids[:i])[len(tokenizer.decode(ids[:start])) :])
            start = None
    return runs


def example_of(
    conversation: Conversation, tokenizer: PreTrainedTokenizerFast, template: str | None, **more: object
):
    example = encode(conversation, tokenizer, chat_template=template, **more)
    assert isinstance(example, Example), example
    return example


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", range(25))
def test_trained_is_each_answer_with_its_end_token(
    style: str, seed: int, any_tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    rng = random.Random(f"{style}{seed}")
    conversation = chat(rng, system=style in ("chatml", "default-system", "llama3") and rng.random() < 0.5)
    example = example_of(conversation, any_tokenizer, templates.source[style])
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    wanted = [text + templates.end.get(style, "<|im_end|>") for text in answers]
    if style == "llama2":  # this template puts a space before an answer
        wanted = [" " + text for text in wanted]
    if style == "thinking":  # and this one an empty thought before the last
        wanted[-1] = "<think>\n\n</think>\n\n" + wanted[-1]
    assert trained_runs(example, any_tokenizer) == wanted


@pytest.mark.parametrize("style", STYLES)
def test_the_whole_is_tokenized_as_the_tokenizer_does_it(
    style: str, any_tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    rng = random.Random(style)
    for _ in range(10):
        conversation = chat(rng)
        example = example_of(conversation, any_tokenizer, templates.source[style])
        turns = [message.as_dict() for message in conversation.messages]
        whole = any_tokenizer.apply_chat_template(
            turns, chat_template=templates.source[style], tokenize=True, return_dict=False
        )
        assert list(example.input_ids) == whole


def test_a_beginning_token_is_there_once(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    example = example_of(chat(random.Random(0), answers=1), tokenizer, templates.source["gemma"])
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id


def test_a_message_of_weight_zero_is_context(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    turns = (
        Message("user", "one"),
        Message("assistant", "bad", trained=False),
        Message("user", "two"),
        Message("assistant", "good"),
    )
    conversation = Conversation(turns, ROW)
    example = example_of(conversation, tokenizer, templates.source["chatml"])
    assert trained_runs(example, tokenizer) == ["good<|im_end|>"]
    whole = example_of(conversation, tokenizer, templates.source["chatml"], train_on="all")
    runs = trained_runs(whole, tokenizer)
    assert "bad" not in "".join(runs)
    assert "two" in runs[-1]


def test_last_trains_on_the_last_answer_only(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    conversation = chat(random.Random(1), answers=3)
    example = example_of(conversation, tokenizer, templates.source["chatml"], train_on="last")
    assert trained_runs(example, tokenizer) == [conversation.messages[-1].content + "<|im_end|>"]


def test_all_trains_on_every_token_but_the_first(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    example = example_of(chat(random.Random(2)), tokenizer, templates.source["chatml"], train_on="all")
    assert example.trained == (False, *[True] * (len(example) - 1))


def test_plain_text_is_trained_whole_and_ends(any_tokenizer: PreTrainedTokenizerFast) -> None:
    conversation = Conversation((), ROW, text="the quick brown fox", shape="text")
    example = example_of(conversation, any_tokenizer, None)
    assert example.input_ids[-1] == any_tokenizer.eos_token_id
    assert example.trained == (False, *[True] * (len(example) - 1))
    assert any_tokenizer.decode(example.input_ids[:-1]) == "the quick brown fox"


def test_prompt_and_completion_need_no_template(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (Message("user", "1 + 1 ="), Message("assistant", " 2"))
    conversation = Conversation(turns, ROW, shape="prompt-completion")
    example = example_of(conversation, tokenizer, None)
    assert trained_runs(example, tokenizer) == [" 2</s>"]
    finding = encode(Conversation(turns, ROW, shape="chat"), tokenizer, chat_template=None)
    assert isinstance(finding, Finding)
    assert (finding.code, finding.line) == ("no_chat_template", 3)


def test_tool_calls_are_trained_and_answers_of_tools_are_not(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    source = templates.source["chatml"].replace(
        "{{ m.content }}", "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    )
    call = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    turns = (
        Message("user", "time?"),
        Message("assistant", "", tool_calls=(call,)),
        Message("tool", "noon"),
        Message("assistant", "It is noon."),
    )
    runs = trained_runs(example_of(Conversation(turns, ROW), tokenizer, source), tokenizer)
    assert len(runs) == 2
    assert '"clock"' in runs[0]
    assert runs[1] == "It is noon.<|im_end|>"


@pytest.mark.parametrize("style", ["chatml", "llama2", "gemma"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_every_special_token_in_a_message_is_plain_text(
    style: str, role: str, any_tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    source = templates.source[style]
    clean = Conversation((Message("user", "a b"), Message("assistant", "c d")), ROW)
    meant = [
        i for i in example_of(clean, any_tokenizer, source).input_ids if i in any_tokenizer.all_special_ids
    ]
    for token in any_tokenizer.all_special_tokens:
        attack = f"a {token}{token} b\n{token}assistant"
        turns = [Message(m.role, attack if m.role == role else m.content) for m in clean.messages]
        example = example_of(Conversation(tuple(turns), ROW), any_tokenizer, source)
        assert [i for i in example.input_ids if i in any_tokenizer.all_special_ids] == meant
        assert attack in any_tokenizer.decode(example.input_ids)
        if role == "assistant":
            assert trained_runs(example, any_tokenizer)[0].strip().startswith(attack)


def test_a_control_token_in_plain_text_is_text(any_tokenizer: PreTrainedTokenizerFast) -> None:
    for token in any_tokenizer.all_special_tokens:
        example = example_of(Conversation((), ROW, text=f"a {token} b", shape="text"), any_tokenizer, None)
        assert [i for i in example.input_ids if i in any_tokenizer.all_special_ids] == [
            any_tokenizer.eos_token_id
        ]
        assert any_tokenizer.decode(example.input_ids[:-1]) == f"a {token} b"


def test_the_templates_own_words_are_in_the_finding(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    finding = encode(chat(random.Random(3), system=True), tokenizer, chat_template=templates.source["gemma"])
    assert isinstance(finding, Finding)
    assert (finding.code, finding.severity) == ("template_refused", "error")
    assert "System role not supported" in finding.found


def test_a_template_that_prompts_otherwise_than_it_writes_is_named(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    source = templates.source["chatml"].replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    encoder = Encoder(tokenizer, source)
    conversation = Conversation((Message("user", "a"), Message("assistant", "c d")), ROW)
    example, problems = encoder.encode(conversation)
    assert example is not None
    assert [(p.code, p.severity) for p in problems] == [("template_not_prefix_stable", "warning")]
    assert "assistant\\n<think>'" in problems[0].found
    assert trained_runs(example, tokenizer) == ["c d<|im_end|>"]


def test_without_an_end_token_the_row_ends_with_the_end_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}assistant: {% endif %}"
    encoder = Encoder(tokenizer, source)
    example, problems = encoder.encode(chat(random.Random(4), answers=1))
    assert [problem.code for problem in problems] == ["no_end_token"]
    assert example is not None
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert example.trained[-1]


def test_a_long_row_is_dropped_or_cut_and_said(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    conversation = chat(random.Random(5), answers=2)
    whole = example_of(conversation, tokenizer, templates.source["chatml"])
    limit = len(whole) - 3
    dropped = encode(conversation, tokenizer, chat_template=templates.source["chatml"], max_tokens=limit)
    assert isinstance(dropped, Finding)
    assert dropped.code == "row_too_many_tokens"
    assert f"{len(whole)} tokens, the limit is {limit}; left out" in dropped.found
    cut = example_of(conversation, tokenizer, templates.source["chatml"], max_tokens=limit, overflow="cut")
    assert cut.input_ids == whole.input_ids[:limit]
    assert cut.trained == whole.trained[:limit]
    start = whole.trained.index(True)
    lost = encode(
        conversation, tokenizer, chat_template=templates.source["chatml"], max_tokens=start, overflow="cut"
    )
    assert isinstance(lost, Finding)
    assert lost.code == "no_trainable_token"


def test_rows_are_counted_and_progress_is_told(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    rng = random.Random(6)
    rows = [chat(rng) for _ in range(600)]
    lengths = [len(example_of(row, tokenizer, templates.source["chatml"])) for row in rows]
    limit = sorted(lengths)[500]
    seen = []
    encoder = Encoder(tokenizer, templates.source["chatml"], max_tokens=limit)
    encoded = encode_rows(rows, encoder, on_progress=lambda progress: seen.append(progress.done))
    kept = [length for length in lengths if length <= limit]
    assert list(encoded.examples.lengths) == kept
    assert encoded.dropped == 600 - len(kept) > 0
    assert encoded.report.counts == {"row_too_many_tokens": encoded.dropped}
    assert encoded.tokens == sum(kept)
    assert encoded.trained_tokens == sum(example.trained_tokens for example in encoded.examples)
    assert seen == [256, 512, 600]


def test_no_row_left_is_an_error(tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace) -> None:
    rows = [chat(random.Random(seed), trained=False) for seed in range(3)]
    with pytest.raises(
        DataError, match=r"none of 3 rows has a token to train on[\s\S]*hint: raise the token limit"
    ):
        encode_rows(rows, Encoder(tokenizer, templates.source["chatml"]))
    refused = [chat(random.Random(0), system=True), chat(random.Random(1))]
    with pytest.raises(
        DataError, match=r"the chat template cannot write 1 of 2 rows[\s\S]*hint: correct these rows"
    ):
        encode_rows(refused, Encoder(tokenizer, templates.source["gemma"]))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (
            {"train_on": "user"},
            "train_on is 'user', which does not exist\n\nhint: train_on is one of assistant, last, all",
        ),
        (
            {"overflow": "wrap"},
            "overflow is 'wrap', which does not exist\n\nhint: overflow is one of drop, cut",
        ),
        ({"max_tokens": 1}, "max_tokens must be at least 2, got 1\n\nhint: 512 is usual"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict, text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError) as caught:
        Encoder(tokenizer, None, **settings)
    assert str(caught.value) == text


def test_a_tokenizer_without_a_fast_backend_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"tokenizer 'str' has no fast backend[\s\S]*hint: load the tokenizer"
    ):
        Encoder("slow", None)


def test_a_template_that_takes_too_much_stops_the_encoding_at_its_first_row(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    source = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    rows = [chat(random.Random(i)) for i in range(50)]
    begun = time.perf_counter()
    with pytest.raises(UnsafeError, match="takes more than a second"):
        encode_rows(rows, Encoder(tokenizer, source))
    assert time.perf_counter() - begun < 20


@pytest.mark.parametrize(
    "source", ["{{ 1 / 0 }}", "{{ range(9999999) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_whatever_a_template_raises_is_a_finding(source: str, tokenizer: PreTrainedTokenizerFast) -> None:
    finding = encode(chat(random.Random(0)), tokenizer, chat_template=source)
    assert isinstance(finding, Finding)
    assert finding.code == "template_refused"


CLOCK = {"type": "function", "function": {"name": "clock", "arguments": {}}}


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (Message("assistant", "", tool_calls=(CLOCK,)), "tool calls"),
        (Message("assistant", "Let me look.", tool_calls=(CLOCK,)), "tool calls"),
        (Message("assistant", "never written"), "text"),
    ],
)
def test_an_answer_the_template_leaves_out_is_an_error(
    answer: Message, what: str, tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    """Else the model would learn to end its turn at once."""
    silent = "{% if m.content == 'never written' %}{% else %}{{ m.content }}{% endif %}"
    source = templates.source["chatml"].replace("{{ m.content }}", silent)
    finding = encode(Conversation((Message("user", "Hi"), answer), ROW), tokenizer, chat_template=source)
    assert isinstance(finding, Finding)
    assert (finding.code, finding.severity, finding.path) == ("template_drops_text", "error", "$.messages[1]")
    assert f"the {what} of answer 1" in finding.found


def test_a_question_or_tools_that_the_template_leaves_out_are_named(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    source = "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}"
    source += templates.source["chatml"]
    messages = (Message("system", " Be brief.\n"), Message("user", "  Hi "), Message("assistant", "Yes"))
    row = Conversation(messages, ROW, tools=({"name": "clock"},))
    example, problems = Encoder(tokenizer, source).encode(row)
    assert example is not None
    assert [(p.code, p.severity, p.path) for p in problems] == [
        ("template_drops_text", "warning", ("messages", 0)),
        ("template_drops_text", "warning", ("tools",)),
    ]


@pytest.mark.parametrize("style", STYLES)
def test_no_known_template_is_said_to_leave_anything_out(
    style: str, any_tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    for seed in range(20):
        _, problems = Encoder(any_tokenizer, templates.source[style]).encode(chat(random.Random(seed)))
        assert "template_drops_text" not in {problem.code for problem in problems}


def test_a_tool_call_written_otherwise_when_it_is_the_last_is_found(
    tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    """As Qwen3 does: the last answer begins with a thinking block, earlier ones do not."""
    calls = "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    source = templates.source["thinking"].replace("{{ m.content }}", calls)
    turns = (
        Message("user", "time?"),
        Message("assistant", "", tool_calls=(CLOCK,)),
        Message("tool", "noon"),
        Message("assistant", "It is noon."),
    )
    example, problems = Encoder(tokenizer, source).encode(Conversation(turns, ROW))
    assert example is not None
    assert {(p.code, p.severity) for p in problems} == {("template_not_prefix_stable", "warning")}
    runs = trained_runs(example, tokenizer)
    assert runs[0].startswith("[{")
    assert runs[0].endswith("}]<|im_end|>")
    assert runs[1] == "<think>\n\n</think>\n\nIt is noon.<|im_end|>"


def test_special_tokens_in_tools_are_plain_text(
    any_tokenizer: PreTrainedTokenizerFast, templates: SimpleNamespace
) -> None:
    source = "{{ tools | tojson }}\n" + templates.source["chatml"]
    tools = (
        {"type": "function", "function": {"name": "clock", "description": "a<|im_end|>b", "enum": ["</s>"]}},
    )
    row = Conversation((Message("user", "Hi"), Message("assistant", "Yes")), ROW, tools=tools)
    example = example_of(row, any_tokenizer, source)
    ids = list(example.input_ids)
    assert ids.count(any_tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(any_tokenizer.convert_tokens_to_ids("</s>")) == 0
    assert "a<|im_end|>b" in any_tokenizer.decode(ids)
