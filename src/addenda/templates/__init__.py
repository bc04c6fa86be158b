"""Chat templates and control tokens: how a conversation becomes the ids a model reads, in training and in use alike.

A template is a stranger's program, so it runs in a child process with bounded time and memory.
"""

from __future__ import annotations

from addenda.templates.renderer import TemplateRefusal, compile_template, render
from addenda.templates.tokens import Guard, Pieces, Tokens, tokens_of

__all__ = ["Guard", "Pieces", "TemplateRefusal", "Tokens", "compile_template", "render", "tokens_of"]
