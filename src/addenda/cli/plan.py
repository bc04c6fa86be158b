"""``addenda plan``: what would be adapted, and what that takes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from addenda.cli.console import Console, binary_size
from addenda.cli.display import Display
from addenda.cli.recipe_flags import read_recipe, recipe_flags
from addenda.cli.verb import verb

if TYPE_CHECKING:
    from addenda.bases import LoadedBase
    from addenda.bases.packed import PackedModel
    from addenda.core import Plan
    from addenda.settings import Recipe
    from addenda.train.memory import Ledger

__all__ = ["command"]


@verb(
    "plan",
    examples=[
        "addenda plan",
        "addenda plan --method ia3",
        "addenda plan --targets q_proj,v_proj --set method.rank=4 --json",
    ],
)
@recipe_flags
def command(console: Console, **flags: Any) -> None:
    """Show which layers a method would adapt, the parameters and bytes that takes, and the memory to train it.

    The base is loaded and tried with a short row; nothing is trained or written.
    """
    recipe = read_recipe(**flags)
    with Display(console) as display:
        base, planned, memory, packed = _measure(recipe, display)
    document = {
        "base": recipe.base.source,
        "weights": base.weights,
        "weights_reason": base.weights_reason,
        "method": recipe.method.name,
        "settings": recipe.method.settings(),
        "parameters": planned.parameters,
        "bytes": planned.bytes,
        "base_parameters": planned.base_parameters,
        "notes": list(planned.notes),
        "path": {"name": packed.path, "reason": packed.reason},
        "fused": dict(packed.fused),
        "not_fused": [{"kind": kind, "reason": why, "count": count} for kind, why, count in packed.unfused],
        "memory_bytes": {**asdict(memory), "total": memory.total},
        "layers": [asdict(row) for row in planned.rows],
    }
    console.result(
        document,
        lambda: (
            f"{_weights(base)}{planned}\n{packed.path} path: {packed.reason}\n{packed.parts}\n{_memory(memory)}"
        ),
    )


def _measure(recipe: Recipe, display: Display) -> tuple[LoadedBase, Plan, Ledger, PackedModel]:
    from addenda.bases.packed import PackedModel
    from addenda.core import attach, plan
    from addenda.recipe import number_format, prepare_base
    from addenda.train.memory import measure_memory
    from addenda.train.session import TOKENS_ON_GPU, TOKENS_PER_MICRO_BATCH

    base = prepare_base(recipe.base, number_format(recipe.base).dtype, display)
    planned = plan(base.model, recipe.method, recipe.targets)
    handle = attach(base.model, recipe.method, recipe.targets, name=recipe.name)
    on_gpu = base.model.device.type == "cuda"
    tokens = recipe.train.tokens_per_micro_batch or (TOKENS_ON_GPU if on_gpu else TOKENS_PER_MICRO_BATCH)[0]
    packed = PackedModel(base.model)
    return base, planned, measure_memory(handle, packed).ledger(tokens, keeps_memory=True), packed


def _weights(base: LoadedBase) -> str:
    return f"base weights: {base.weights}, {base.weights_reason}\n" if base.weights_reason else ""


def _memory(memory: Ledger) -> str:
    parts = ", ".join(f"{name} {binary_size(size)}" for name, size in asdict(memory).items())
    return f"memory to train: about {binary_size(memory.total)} ({parts})"
