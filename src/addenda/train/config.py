"""Every setting of a training run, with its range; ``None`` always means "derive it"."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from addenda.core.ranges import integer, number
from addenda.errors import ConfigError

__all__ = ["HARMLESS", "OPTIMIZERS", "SCHEDULES", "TrainConfig"]

OPTIMIZERS = ("adamw", "adamw8bit")
SCHEDULES = ("cosine", "linear", "constant")
SHARDINGS = ("none", "full")
KERNELS = ("auto", "off")
OFFLOADS = ("auto", "none", "activations")
ROUNDINGS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "NF4", "INT8"),
)
"""The packed formats; named here too, since settings are read without loading PyTorch."""
HARMLESS = (
    "save_every_steps",
    "save_every_minutes",
    "keep_checkpoints",
    "seeds",
    "threads",
    "sharding",
    "kernels",
    "memory_gib",
    "offload",
    "export_to",
)
"""Settings that change no number of the result, so a resumed run may change them."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train; all values are checked together when it is made.

    Raises:
        ConfigError: one or more settings are out of range; all are named.

    Example:
        >>> TrainConfig(epochs=1, batch_size=8).schedule
        'cosine'
    """

    epochs: int = 3
    """Passes over the training rows, >= 1."""
    max_steps: int | None = None
    """Stop after this many optimiser steps if the epochs are not over by then; None for no such limit."""
    learning_rate: float | None = None
    """Peak learning rate of AdamW, > 0; None takes the method's own."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """``adamw``, or ``adamw8bit``: bitsandbytes' AdamW, whose averages of matrices of 4,096 numbers or more take 8 bits
    each instead of 32."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from its peak to the end: ``cosine``, ``linear`` or ``constant``."""
    warmup_fraction: float = 0.03
    """Share of all steps in which the learning rate rises linearly, in [0, 1); if above 0, three steps at least."""
    min_lr_fraction: float = 0.0
    """Where cosine and linear schedules end, as a share of the peak, in [0, 1]."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, >= 0; vectors (biases, scales) are never decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging factors of the gradient and of its square, each in [0, 1)."""
    eps: float = 1e-8
    """AdamW's guard against division by zero, > 0."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient of all adapter parameters together, > 0; None never clips."""
    batch_size: int = 16
    """Rows per optimiser step (the global batch), >= 1; it does not change the memory needed."""
    tokens_per_micro_batch: int | None = None
    """Tokens run at once, >= 1; more is faster up to a point and takes more memory; None derives it."""
    memory_gib: float | None = None
    """Memory the run may hold, in GiB, > 0; None takes what is free. Where it is scarce, fewer tokens run at once, and
    blocks of the model keep their input alone and run again in the backward."""
    evals_per_epoch: int = 2
    """Evaluations on the held-out rows per epoch, evenly spread, >= 1."""
    eval_every_steps: int | None = None
    """Steps between evaluations, >= 1; None spreads ``evals_per_epoch``."""
    patience: int | None = 3
    """Stop after this many evaluations in a row without a better held-out nll, >= 1; None never stops early."""
    save_every_steps: int | None = None
    """Steps between checkpoints, >= 1; None saves by time alone."""
    save_every_minutes: float | None = 2.0
    """Minutes between checkpoints, > 0; None saves by steps alone."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, >= 2, so that one damaged checkpoint never ends a run."""
    seed: int = 0
    """Seed of the row order and of dropout, >= 0."""
    seeds: int = 1
    """How many times a recipe trains, with ``seed``, ``seed`` + 1 and so on, >= 1: the figures then come with their
    spread over the seeds, and the first seed's adapter is the run's."""
    threads: int | None = None
    """CPU threads; None leaves PyTorch's choice. Another number may change the last bits of the result."""
    sharding: Literal["none", "full"] = "none"
    """How several processes share the base: ``none``, each holds all of it; ``full``, a share of each block (FSDP2)."""
    kernels: Literal["auto", "off"] = "auto"
    """``auto`` compiles the package's C++ where the run is long enough to gain by it, once for each machine; ``off``
    runs plain PyTorch. They differ in the last bits of the result."""

    offload: Literal["auto", "none", "activations"] = "auto"
    """On a GPU, whether what the forward pass keeps waits in the machine's memory for its backward; ``auto``: where it
    would not fit otherwise, even with every block run again. It changes no number of the result."""
    through: str | None = None
    """Packed format through which the adapter is trained, such as ``q4_1``: every step computes with the weights that a
    merged file in this format will hold, so that the file answers as what was trained. One of GGUF's (the K and IQ
    types need the extra ``llamacpp``), ``nf4`` or ``int8``; None trains beside the weights as they are."""
    export_to: str | tuple[str, ...] = ()
    """Formats that the adapter is to be exported to afterwards, as ``addenda export --to`` names them: what one of them
    cannot carry is refused before training."""

    def __post_init__(self) -> None:
        # TOML and JSON have no tuples.
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.export_to, str):
            named = tuple(part.strip() for part in self.export_to.split(",") if part.strip())
            object.__setattr__(self, "export_to", named)
        elif isinstance(self.export_to, list):
            object.__setattr__(self, "export_to", tuple(self.export_to))
        if isinstance(self.through, str):
            object.__setattr__(self, "through", self.through.lower())
        found = self._problems()
        if found:
            raise ConfigError("; ".join(found), where={"section": "train"}, hint="see 'addenda train --help'")

    def _problems(self) -> list[str]:
        found = integer("epochs", self.epochs) + integer("batch_size", self.batch_size)
        found += integer("seeds", self.seeds)
        found += integer("evals_per_epoch", self.evals_per_epoch) + integer("seed", self.seed, least=0)
        found += integer("keep_checkpoints", self.keep_checkpoints, least=2)
        optional = (
            "max_steps",
            "tokens_per_micro_batch",
            "eval_every_steps",
            "patience",
            "save_every_steps",
            "threads",
        )
        for name in optional:
            found += [] if getattr(self, name) is None else integer(name, getattr(self, name))
        for name in ("learning_rate", "clip_norm", "save_every_minutes", "memory_gib"):
            found += [] if getattr(self, name) is None else number(name, getattr(self, name), above=0.0)
        found += number("warmup_fraction", self.warmup_fraction, least=0.0, below=1.0)
        found += number("min_lr_fraction", self.min_lr_fraction, least=0.0)
        found += number("weight_decay", self.weight_decay, least=0.0) + number("eps", self.eps, above=0.0)
        return found + self._choices()

    def _choices(self) -> list[str]:
        found = []
        choices = {
            "schedule": SCHEDULES,
            "optimizer": OPTIMIZERS,
            "sharding": SHARDINGS,
            "kernels": KERNELS,
            "offload": OFFLOADS,
        }
        if not isinstance(self.export_to, tuple) or not all(isinstance(each, str) for each in self.export_to):
            found.append(f"export_to must be names of formats, got {self.export_to!r}")
        if self.through is not None and str(self.through).upper() not in ROUNDINGS:
            found.append(f"through must be one of {' '.join(ROUNDINGS).lower()}, got {self.through!r}")
        for name, known in choices.items():
            if getattr(self, name) not in known:
                found.append(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if isinstance(self.min_lr_fraction, int | float) and self.min_lr_fraction > 1.0:
            found.append(f"min_lr_fraction must be at most 1, got {self.min_lr_fraction!r}")
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            return [*found, f"betas must be two numbers, got {self.betas!r}"]
        for index, beta in enumerate(self.betas):
            found += number(f"betas[{index}]", beta, least=0.0, below=1.0)
        return found

    def identity(self) -> dict[str, str]:
        """Return the settings that a resumed run must share, as text."""
        fields = dataclasses.fields(self)
        return {f"train.{f.name}": repr(getattr(self, f.name)) for f in fields if f.name not in HARMLESS}
