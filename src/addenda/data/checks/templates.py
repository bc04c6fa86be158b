"""Checks that need the base's chat template and tokenizer: what a row becomes when it is encoded."""

from __future__ import annotations

from typing import ClassVar

from addenda.data.checks.base import Check, register

__all__ = [
    "NoChatTemplate",
    "NoEndToken",
    "RowTooManyTokens",
    "TemplateDropsText",
    "TemplateNotPrefixStable",
    "TemplateRefused",
]

_ROW = b'{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}\n'
_SYSTEM = _ROW.replace(b'[{"role": "user"', b'[{"role": "system", "content": "Be kind."}, {"role": "user"')
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _TemplateCheck(Check):
    """A check whose examples also need a chat template and a token limit."""

    template: ClassVar[str | None] = _CHATML
    """The chat template on which ``bad`` fires."""
    max_tokens: ClassVar[int] = 512


@register
class TemplateRefused(_TemplateCheck):
    """The chat template of the base refuses a conversation.

    What it finds: an error that the template itself raises, in its own words.
    Why it matters: the model was never trained on such conversations, so neither can this run be.
    Example: a system message for a model whose template has no system role.
    What to do: change the rows (move the system text into the first user message), or choose another base.
    """

    code, severity, stage = "template_refused", "error", "encode"
    fix = "change the row as the template asks, or choose another base"
    bad = _SYSTEM
    good = _ROW
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    template += _CHATML


@register
class TemplateNotPrefixStable(_TemplateCheck):
    """The chat template writes an answer otherwise than it asks for one.

    What it finds: a template whose rendering of the conversation so far, with the prompt for an answer, is not
    the beginning of its rendering of the whole conversation. Where the answer can still be found it is a warning,
    else an error.
    Why it matters: what is trained would not follow what the model sees at use.
    Example: a template that drops earlier turns, or adds a tag to the prompt only.
    What to do: train on single-turn rows, choose another base, or correct the template.
    """

    code, severity, stage = "template_not_prefix_stable", "error", "encode"
    fix = "use single-turn rows, another base, or a template that only appends"
    bad = _ROW
    good = _ROW
    template = "{{ messages | length }} turns\n" + _CHATML


@register
class TemplateDropsText(_TemplateCheck):
    """The chat template leaves out a part of the conversation.

    What it finds: an answer, or a tool call in it, that is not in the rendered text: an error. A system or user
    message, or descriptions of tools, that are not in it: a warning.
    Why it matters: of such an answer only the end token is left, and the model learns to say nothing; without
    the rest it learns answers to what it never saw.
    Example: tool calls for a model whose template knows no tools.
    What to do: choose a base whose template writes them, or take them out of the rows.
    """

    code, severity, stage = "template_drops_text", "error", "encode"
    fix = "choose a base whose template writes it, or take it out of the rows"
    bad = (
        b'{"messages": [{"role": "user", "content": "The time?"}, {"role": "assistant", "tool_calls": '
        b'[{"type": "function", "function": {"name": "clock", "arguments": {}}}]}]}\n'
    )
    good = _ROW


@register
class NoChatTemplate(_TemplateCheck):
    """The base has no chat template, but the rows are conversations.

    What it finds: messages where there is no template to write them with.
    Why it matters: any layout made up here would be unknown to the model, and to whoever serves it.
    Example: chat rows for a base that was only pretrained.
    What to do: choose an instruction-tuned base, give a template, or write rows of prompt and completion or of text.
    """

    code, severity, stage = "no_chat_template", "error", "encode"
    fix = "choose an instruction-tuned base, give a template, or write prompt/completion or text rows"
    bad = _ROW
    good = b'{"prompt": "Hi.", "completion": " Hello."}\n'
    template = None


@register
class NoEndToken(_TemplateCheck):
    """The chat template ends an answer with no special token.

    What it finds: an answer that is followed by no special token in the rendered conversation.
    Why it matters: the model could not learn where to stop. The tokenizer's end-of-text token is put after the
    last answer of each row and trained on.
    Example: a template that writes ``User: ...`` and ``Assistant: ...`` in plain text.
    What to do: nothing for single answers; for long chats choose a template with an end-of-turn token.
    """

    code, severity, stage = "no_end_token", "warning", "encode"
    fix = "nothing for single answers; else choose a template with an end-of-turn token"
    bad = _ROW
    good = _ROW
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"


@register
class RowTooManyTokens(_TemplateCheck):
    """A row is longer than the token limit.

    What it finds: rows with more tokens than ``max_tokens``; what is done about them is part of the finding:
    dropped, or cut at the end so that their beginning stays.
    Why it matters: a row that vanishes or loses its answer silently is lost work.
    Example: a pasted document in the question.
    What to do: shorten the row, raise the limit, or choose ``cut`` instead of ``drop``.
    """

    code, severity, stage = "row_too_many_tokens", "warning", "encode"
    fix = "shorten the row, or raise the token limit"
    bad = _ROW.replace(b"Hi.", b"Hi. " * 600) + _ROW
    good = _ROW
