from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
import transformers

from addenda.bases import template
from addenda.bases.directory import open_directory
from addenda.bases.template import TEMPLATES, render_chat, with_chat_template
from addenda.errors import BaseModelError, UnsafeError

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
]


@pytest.fixture
def base(llama_folder: Path):
    (llama_folder / "chat_template.jinja").unlink()
    return open_directory(llama_folder, name="tiny", source="here")


def test_the_plain_template_is_never_used_unasked(base) -> None:
    with pytest.raises(BaseModelError, match="no chat template") as caught:
        render_chat(base.tokenizer, MESSAGES)
    assert "'plain'" in caught.value.hint


def test_the_plain_template_ends_an_answer_with_the_end_token(base) -> None:
    chosen = with_chat_template(base, "plain")
    text = render_chat(chosen.tokenizer, MESSAGES)
    assert text == "System: Be brief.\nUser: Hi\nAssistant: Hello!</s>\n"
    assert render_chat(chosen.tokenizer, MESSAGES[:2], add_generation_prompt=True).endswith(
        "User: Hi\nAssistant: "
    )


def test_choosing_a_template_changes_the_record_and_leaves_the_old_base_alone(base) -> None:
    chosen = with_chat_template(base, "plain")
    assert base.chat_template is None
    assert base.tokenizer.chat_template is None
    assert chosen.model is base.model
    assert chosen.chat_template == chosen.tokenizer.chat_template == TEMPLATES["plain"]
    assert chosen.template_sha256 == sha256(TEMPLATES["plain"].encode()).hexdigest()
    assert chosen.notes == ("chat template 'plain' chosen by name",)


def test_a_text_starts_as_the_tokenizer_starts_every_text(base) -> None:
    from tokenizers.processors import TemplateProcessing

    base.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    chosen = with_chat_template(base, "plain")
    assert render_chat(chosen.tokenizer, MESSAGES[1:]).startswith("<s>User: Hi")


def test_a_template_given_as_text_is_used(base) -> None:
    chosen = with_chat_template(base, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    assert render_chat(chosen.tokenizer, MESSAGES) == "[system]Be brief.[user]Hi[assistant]Hello!"


def test_tags_and_loop_controls_that_transformers_adds_are_known(base) -> None:
    text = (
        "{% for m in messages %}{%- generation -%}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    assert render_chat(with_chat_template(base, text).tokenizer, MESSAGES) == "Be brief."


def test_tools_reach_the_template(base) -> None:
    chosen = with_chat_template(base, "{{ tools[0].name }} {{ messages | length }}")
    assert render_chat(chosen.tokenizer, MESSAGES, tools=[{"name": "search"}]) == "search 3"


@pytest.mark.parametrize("text", ["{% for m in messages %}", "{{ m.", "{% no_such_tag %}"])
def test_text_that_is_no_jinja_is_refused_when_chosen(base, text: str) -> None:
    with pytest.raises(BaseModelError, match="not valid Jinja"):
        with_chat_template(base, text)


def test_a_template_in_the_folder_is_checked_when_loaded(llama_folder: Path) -> None:
    (llama_folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(BaseModelError, match="not valid Jinja"):
        open_directory(llama_folder, name="tiny", source="here")
    (llama_folder / "chat_template.jinja").write_text("{{ 1 }}" + " " * template.MAX_TEMPLATE)
    with pytest.raises(UnsafeError, match="more than"):
        open_directory(llama_folder, name="tiny", source="here")


@pytest.mark.parametrize(
    "text",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ range(1000000) | list }}",
    ],
)
def test_a_template_that_refuses_or_reaches_out_is_a_typed_error(base, text: str) -> None:
    chosen = with_chat_template(base, text)
    with pytest.raises(BaseModelError, match="refuses these messages") as caught:
        render_chat(chosen.tokenizer, MESSAGES)
    assert caught.value.where["roles"] == "system, user, assistant"


def test_an_unknown_role_is_refused_by_the_plain_template(base) -> None:
    with pytest.raises(BaseModelError, match="refuses these messages"):
        render_chat(with_chat_template(base, "plain").tokenizer, [{"role": "tool", "content": "x"}])


def test_a_misspelt_name_gives_the_nearest(base) -> None:
    with pytest.raises(BaseModelError, match="'plan'") as caught:
        with_chat_template(base, "plan")
    assert "'plain'" in caught.value.hint


def test_an_encoder_takes_no_template(bert_folder: Path) -> None:
    encoder = open_directory(bert_folder, name="bert", source="here")
    with pytest.raises(BaseModelError, match="encoder"):
        with_chat_template(encoder, "plain")


def test_rendering_equals_transformers_own(llama_folder: Path) -> None:
    base = open_directory(llama_folder, name="tiny", source="here")
    reference = transformers.AutoTokenizer.from_pretrained(llama_folder)
    for prompt in (True, False):
        assert render_chat(base.tokenizer, MESSAGES, add_generation_prompt=prompt) == (
            reference.apply_chat_template(MESSAGES, add_generation_prompt=prompt, tokenize=False)
        )
