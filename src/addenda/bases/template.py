"""Chat templates: hashing, rendering, and a plain one for bases that have none."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from addenda.bases.loaded import LoadedBase
from addenda.errors import BaseModelError, UnsafeError, nearest
from addenda.templates import TemplateRefusal, compile_template, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["TEMPLATES", "render_chat", "template_sha256", "tokenizer_sha256", "with_chat_template"]

MAX_TEMPLATE = 256 * 1024
"""Characters of a chat template."""

TEMPLATES: dict[str, str] = {
    "plain": (
        "{% for message in messages %}"
        "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message['role']] + ': ' "
        "+ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
    )
}
"""Templates a recipe may name. ``plain`` writes "User: ...", "Assistant: ..." lines; an answer ends with the
end-of-sequence token, so a trained model stops."""


def template_sha256(template: str | None) -> str | None:
    """Return the SHA-256 of a template's UTF-8 text, or None for None.

    Example:
        >>> template_sha256("{{ messages }}")[:12]
        'f24189f08c85'
    """
    return None if template is None else hashlib.sha256(template.encode("utf-8")).hexdigest()


def tokenizer_sha256(folder: Path) -> str:
    """Return the SHA-256 of the bytes of ``folder/tokenizer.json``."""
    return hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


def render_chat(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Render messages as the text the model reads, as transformers would, with bounded time and memory.

    Args:
        tokenizer: one whose ``chat_template`` is set.
        messages: ``{"role": ..., "content": ...}`` mappings.
        tools: tool descriptions for templates that take them.
        add_generation_prompt: end with the opening of the assistant's turn.

    Raises:
        BaseModelError: there is no template, or it refuses these messages.
        UnsafeError: rendering takes more time or memory than any sound template does.
    """
    if not tokenizer.chat_template:
        raise BaseModelError(
            "this base has no chat template, so conversations cannot be rendered",
            where={"tokenizer": tokenizer.name_or_path},
            hint="name one: with_chat_template(base, 'plain'), or base.template = \"plain\" in a recipe",
        )
    try:
        return render(
            tokenizer.chat_template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            special_tokens=tokenizer.special_tokens_map,
        )
    except TemplateRefusal as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise BaseModelError(
            f"the chat template refuses these messages: {error}",
            where={"roles": roles, "template sha256": template_sha256(tokenizer.chat_template)},
            hint="many templates want user and assistant in turn, and a system message only in front",
        ) from error


def check_template(template: str) -> None:
    """Raise unless ``template`` is a Jinja template of bounded size, time and memory."""
    if len(template) > MAX_TEMPLATE:
        raise UnsafeError(
            f"the chat template has {len(template):,} characters, more than {MAX_TEMPLATE:,}",
            hint="no sound template is that long",
        )
    try:
        compile_template(template)
    except TemplateRefusal as error:
        raise BaseModelError(
            f"the chat template is not valid Jinja: {error}", hint="correct it, or name one: 'plain'"
        ) from error


def with_chat_template(base: LoadedBase, template: str) -> LoadedBase:
    """Return ``base`` with another chat template; the model is shared, the tokenizer is a copy.

    Args:
        base: a causal language model.
        template: a name in `TEMPLATES`, or the Jinja text itself (text with a ``{``).

    Raises:
        BaseModelError: the name is unknown, the text is not Jinja, or ``base`` is an encoder.
    """
    if base.kind != "causal-lm":
        raise BaseModelError(
            f"'{base.name}' is an encoder: it answers no conversations",
            hint="take a causal language model, e.g. 'smollm2-135m-instruct'",
        )
    if "{" in template:
        text, note = template, "chat template given by the user"
    elif template in TEMPLATES:
        text, note = (
            _opening(base.tokenizer) + TEMPLATES[template],
            f"chat template '{template}' chosen by name",
        )
    else:
        near = nearest(template, TEMPLATES)
        raise BaseModelError(
            f"no chat template is named '{template}'",
            where={"names": ", ".join(TEMPLATES)},
            hint=f"did you mean '{near[0]}'?" if near else "give a name, or the Jinja text itself",
        )
    check_template(text)
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.chat_template = text
    notes = tuple(kept for kept in base.notes if not kept.startswith(NO_TEMPLATE))
    return dataclasses.replace(
        base,
        tokenizer=tokenizer,
        chat_template=text,
        template_sha256=template_sha256(text),
        notes=(*notes, note),
    )


NO_TEMPLATE = "no chat template"
"""How the note of a base without a template starts."""


def _opening(tokenizer: PreTrainedTokenizerFast) -> str:
    """``{{ bos_token }}`` where the tokenizer itself begins every text with it, as the base saw in pretraining."""
    ids = tokenizer("a")["input_ids"]
    starts = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" if starts else ""
