"""The base that a recipe names, as a causal language model with the chat template it asks for."""

from __future__ import annotations

from pathlib import Path

import torch

from addenda.bases import LoadedBase, load_base, with_chat_template
from addenda.core.progress import OnProgress
from addenda.errors import BaseModelError
from addenda.settings import BaseSettings
from addenda.train import choose_device

__all__ = ["load_causal"]


def load_causal(
    settings: BaseSettings,
    dtype: torch.dtype | None,
    *,
    on_progress: OnProgress | None,
    weightless: bool = False,
) -> LoadedBase:
    """Load the base of a recipe.

    Args:
        settings: which one, and how; its dtype is not looked at.
        dtype: of the weights, or to compute in; None keeps the stored one.
        on_progress: told how fetching and converting go.
        weightless: leave the dense weights out, to plan with; it then stays on the CPU.

    Raises:
        BaseModelError: it is an encoder, or the template is none.
        ConfigError: its device is not there.
    """
    base = load_base(
        settings.source,
        dtype=dtype,
        weights=settings.weights,
        device=choose_device(settings.device).device,
        weightless=weightless,
        on_progress=on_progress,
    )
    if base.kind != "causal-lm":
        raise BaseModelError(
            f"'{base.name}' is an encoder, which answers nothing",
            hint="choose a causal language model: 'addenda models'",
        )
    if settings.template is not None:
        path = Path(settings.template)
        text = path.read_text(encoding="utf-8") if path.is_file() else settings.template
        base = with_chat_template(base, text)
    return base
