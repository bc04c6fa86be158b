"""Chat templates: a stranger's programs, run in a child process with bounded time and memory."""

from __future__ import annotations

from addenda.templates.renderer import TemplateRefusal, compile_template, render

__all__ = ["TemplateRefusal", "compile_template", "render"]
