"""The Modelfile by which Ollama takes a GGUF model in."""

from __future__ import annotations

from addenda.bases import LoadedBase
from addenda.bases.generate import stop_ids
from addenda.templates import TemplateRefusal, render

__all__ = ["modelfile"]

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(base: LoadedBase, file: str) -> str:
    """Return the text of a Modelfile for a merged model.

    Ollama has templates of its own, in another language than the tokenizer's. One in the ChatML form is written out
    where the base's own writes the same; for others Ollama goes by what it recognizes in the file.

    Args:
        base: the model's base, with its template.
        file: name of the GGUF file beside the Modelfile.
    """
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {min(base.context_length, 8192)}"]
    if base.chat_template:
        ends = sorted(stop_ids(base, [{"role": "user", "content": "a"}]))
        lines += [f'PARAMETER stop "{base.tokenizer.decode([token])}"' for token in ends]
    if template := _template(base):
        lines.append(f'TEMPLATE """{template}"""')
    return "\n".join(lines) + "\n"


def _template(base: LoadedBase) -> str:
    if not base.chat_template:
        return ""
    messages = [
        {"role": "system", "content": "s y s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    try:
        written = render(
            base.chat_template,
            messages,
            add_generation_prompt=True,
            special_tokens=base.tokenizer.special_tokens_map,
        )
    except TemplateRefusal:
        return ""
    chatml = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)
    return _CHATML if written == f"{chatml}<|im_start|>assistant\n" else ""
