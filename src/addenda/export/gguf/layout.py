"""One model as llama.cpp keeps it: the name of each tensor, the order of its rows, and the hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from addenda.errors import ExportError
from addenda.export.gguf.architectures import ARCHITECTURES, Architecture, Value
from addenda.export.gguf.rope import rope_factors, rope_keys, rope_problems

__all__ = ["Layout", "layout_of"]


@dataclass(frozen=True)
class Layout:
    """How one model is kept in a GGUF file. `layout_of` makes one."""

    config: Any
    """The model's transformers config."""
    architecture: Architecture

    @cached_property
    def _names(self) -> Any:
        import gguf

        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(kinds[self.architecture.name], self.config.num_hidden_layers)

    def tensor_name(self, name: str) -> str | None:
        """Return what the file calls a parameter, or None where it has no one tensor of its own there.

        Tied output weights have none, nor have stacked experts whose two projections lie in one parameter.

        Args:
            name: a key of the model's state dict, e.g. ``model.layers.0.mlp.up_proj.weight``.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            return None
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        return f"{found}.weight" if found and found.endswith("_exps") else found

    def rows(self, name: str, matrix: Tensor) -> Tensor:
        """Return the rows of a matrix in the file's order.

        Holds for whatever a layer's output is made by: its weight, its bias, or the factor B of a low-rank update.

        Args:
            name: the parameter or the layer, e.g. ``model.layers.0.self_attn.q_proj``.
            matrix: (d_out, ...), not written to.
        """
        parts = name.split(".")
        if not self.architecture.pairs_of_rows or not {"q_proj", "k_proj"} & set(parts):
            return matrix
        heads = self.config.num_attention_heads if "q_proj" in parts else self.config.num_key_value_heads
        return matrix.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).flatten(0, 2)

    def tensors(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what the file keeps of a parameter, by the names there; nothing of tied output weights.

        Raises:
            ExportError: the file has no place for it.
        """
        if name == "lm_head.weight" and self.config.tie_word_embeddings:
            return {}
        if name.endswith("experts.gate_up_proj"):
            halves = tensor.chunk(2, dim=1)
            stem = name.removesuffix("gate_up_proj")
            return {
                self._required(f"{stem}{part}_proj"): half
                for part, half in zip(("gate", "up"), halves, strict=True)
            }
        if self.architecture.one_in_norms and name.endswith("norm.weight"):
            tensor = tensor.float() + 1
        if name.endswith(".weight") and name.split(".")[-2] in self.architecture.transposed:
            tensor = tensor.T
        if name.endswith("shared_expert_gate.weight"):
            tensor = tensor.flatten()  # its one row is a vector there, by which others tell its shape
        return {self._required(name): self.rows(name, tensor)}

    def _required(self, name: str) -> str:
        found = self.tensor_name(name)
        if found is None:
            raise ExportError(
                f"a GGUF file of architecture '{self.architecture.name}' has no place for '{name}'",
                where={"model type": self.config.model_type},
                hint="write the model as safetensors: --to merged",
            )
        return found

    def added(self) -> dict[str, Tensor]:
        """Return the tensors that stand for no parameter: what the positions' frequencies are divided by."""
        return rope_factors(self.config)

    def hyperparameters(self) -> dict[str, Value]:
        """Return the keys that llama.cpp builds the model from."""
        made: dict[str, Value] = {}
        for key, source in self.architecture.keys.items():
            value = getattr(self.config, source, None) if isinstance(source, str) else source(self.config)
            if value is not None:
                made[key] = value
        window = self._window()
        if window and not self.architecture.windows:
            made["context_length"] = min(window, self.config.max_position_embeddings)
        made |= rope_keys(self.config)
        return {f"{self.architecture.name}.{key}": value for key, value in made.items()}

    def _window(self) -> int | None:
        """The sliding window, in tokens, of a model of which at least one layer has one."""
        window: int | None = getattr(self.config, "sliding_window", None)
        kinds = getattr(self.config, "layer_types", None)
        slides = "sliding_attention" in kinds if kinds else getattr(self.config, "use_sliding_window", True)
        return window if slides else None

    def problems(self) -> list[str]:
        """Return what of this model llama.cpp would compute otherwise; empty where it would not."""
        found = []
        for setting, granted in self.architecture.taken_for_granted.items():
            expected = granted(self.config) if callable(granted) else granted
            value = getattr(self.config, setting, expected)
            if value != expected:
                found.append(f"its {setting} is {value!r}; llama.cpp takes {expected!r} for granted")
        return found + rope_problems(self.config)


def layout_of(config: Any) -> Layout:
    """Return how a model of this config is kept.

    Args:
        config: of a causal transformers model.

    Raises:
        ExportError: its type has no record here, or llama.cpp would compute something else; all of that at once.
    """
    kind = str(config.model_type)
    if kind not in ARCHITECTURES:
        raise ExportError(
            f"no GGUF file can be written for models of type '{kind}'",
            where={"known": ", ".join(sorted(ARCHITECTURES))},
            hint="write the model as safetensors: --to merged",
        )
    layout = Layout(config, ARCHITECTURES[kind])
    if problems := layout.problems():
        raise ExportError(
            "llama.cpp would compute something else: " + "; ".join(problems),
            where={"model type": kind},
            hint="write the model as safetensors: --to merged",
        )
    return layout
