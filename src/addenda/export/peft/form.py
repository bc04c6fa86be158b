"""What a form is: how the adapters of one method look in PEFT's folder. And which forms there are."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from addenda.core.contract import Adapter, Base, Method
from addenda.core.handle import Handle
from addenda.core.layers import LayerKind, view_of
from addenda.core.targets import resolve
from addenda.core.views import PartView
from addenda.errors import CheckpointError

__all__ = [
    "CONFIG",
    "PREFIX",
    "SHARED_PREFIX",
    "TENSORS",
    "Form",
    "agreed",
    "form",
    "form_for",
    "form_of",
    "forms",
    "layers_of",
    "seeded",
]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Before the path of an adapted layer."""
SHARED_PREFIX = "base_model."
"""Before the name of what all layers share."""


class Form(ABC):
    """How one method's settings and tensors are called in PEFT's folder; stateless.

    Adapters are read by filling the tensors that `tensors` and `shared` return, so these are views on the
    parameters, in PEFT's shapes. A form whose shapes are no views overrides `fill` as well.
    """

    peft_type: ClassVar[str]
    """PEFT's name of the method."""
    method: ClassVar[type[Method]]
    """Ours."""
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed")
    """Layer kinds whose adapters PEFT has a layout for."""
    reads: ClassVar[tuple[str, ...]]
    """Keys of the configuration that `read_settings` takes into account."""
    harmless: ClassVar[tuple[str, ...]] = ()
    """Keys that say how training began or ran, and change nothing of what a trained adapter computes."""
    unknown: ClassVar[tuple[str, ...]] = ()
    """Keys that most of PEFT's configurations have and this one has not: they are not written."""
    of_model: ClassVar[bool] = False
    """Whether the adapter stands on the model as a whole, so that its tensors carry no layer's path."""
    literal_targets: ClassVar[bool] = False
    """Whether a text for ``target_modules`` is a name, and no regular expression."""
    names: ClassVar[tuple[str, ...]]
    """What a layer's tensors are called after its path and a dot."""
    integers: ClassVar[tuple[str, ...]] = ()
    """Those of all these names whose tensors hold whole numbers."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Those of `names` that a file may lack; `fill` then makes up for them."""
    shared_names: ClassVar[tuple[str, ...]] = ()
    """What the tensors are called that layers share, after ``base_model.`` and before another dot, if any."""
    why_unasked: ClassVar[str] = ""
    """Why PEFT cannot be asked what a written folder answers; empty where it can."""

    @classmethod
    def claims(cls, config: Mapping[str, Any]) -> bool:
        """Whether a configuration of `peft_type` is of this form; several methods may go by one name there."""
        return True

    @abstractmethod
    def settings(self, handle: Handle) -> dict[str, Any]:
        """Return the adapter's settings under PEFT's keys."""

    @abstractmethod
    def read_settings(
        self, config: Mapping[str, Any], paths: Sequence[str], tensors: Mapping[str, Tensor]
    ) -> Method:
        """Return the method that a configuration describes.

        Args:
            config: the configuration, without keys that have no counterpart here.
            paths: the adapted layers.
            tensors: the file's tensors, for what only their shapes tell.
        """

    @abstractmethod
    def tensors(self, adapter: Adapter, layer: Base) -> dict[str, Tensor]:
        """Return a layer's tensors under PEFT's names, those of `names`, in PEFT's shapes."""

    def shared(self, common: nn.Module) -> dict[str, Tensor]:
        """Return what all layers share under PEFT's names, those of `shared_names`, in PEFT's shapes."""
        return {}

    def why_not(self, kind: LayerKind) -> str | None:
        """Return why PEFT has no layout for adapters on layers of this kind, or None where it has."""
        return why_not(kind, self.kinds)

    def key(self, path: str, name: str) -> str:
        """Return what a tensor of the layer at ``path`` is called in the file."""
        return name if self.of_model else f"{PREFIX}{path}.{name}"

    def mixed(self, config: Mapping[str, Any]) -> list[str]:
        """Return the names of the folders, beside the configuration, that hold the adapters it mixes; none for most."""
        return []

    def apart(
        self, model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what was read with a tensor for each name that `tensors` and `shared` return.

        Overridden where PEFT keeps several layers under one name, writes a tensor many times, or makes it anew.

        Args:
            model: the base, before anything is attached.
            config: the configuration.
            tensors: the file's tensors under their whole names.
        """
        return dict(config), dict(tensors)

    def together(
        self, handle: Handle, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Undo `apart` for what is to be written."""
        return dict(config), dict(tensors)

    def along(self, model: nn.Module, paths: Sequence[str]) -> list[str]:
        """Return layers that PEFT adapts along with these, though neither settings nor tensors name them."""
        return []

    def problems(self, handle: Handle) -> list[str]:
        """Return why PEFT computes otherwise what this adapter computes, though it has a form for the method."""
        return []

    def prepare(  # noqa: B027  (most forms have nothing to make up for)
        self, adapter: Adapter, layer: Base, method: Method
    ) -> None:
        """Set what PEFT computes from the layer when it loads; called once, before `tensors` and `fill`."""

    def fill(self, adapter: Adapter, layer: Base, given: Mapping[str, Tensor]) -> None:
        """Write tensors under PEFT's names, whose shapes are right, into the adapter."""
        with torch.no_grad():
            for name, place in self.tensors(adapter, layer).items():
                place.copy_(given[name])


def why_not(kind: LayerKind, kinds: Sequence[str]) -> str | None:
    """Return why a layer is of none of these kinds of PEFT's: a part counts by its own kind alone."""
    names = (kind.name,) if issubclass(kind.view, PartView) else (kind.name, kind.stands_for)
    return None if any(name in kinds for name in names) else "PEFT has no layout for it"


def layers_of(
    model: nn.Module, config: Mapping[str, Any], kinds: Sequence[str] = Form.kinds
) -> dict[str, Base]:
    """Return the layers that a configuration's ``target_modules`` name, by path, in the model's order."""
    targets = config.get("target_modules") or "all-linear"
    chosen = [targets] if isinstance(targets, str) else list(targets)
    layers = resolve(model, chosen, lambda kind: why_not(kind, kinds))
    return {path: view_of(layer, path) for path, layer in layers.items()}


def agreed(config: Mapping[str, Any], key: str, default: int, sizes: Iterable[int]) -> int:
    """Return a configuration's size, which the tensors have to show too, before anything of that size is made.

    Raises:
        CheckpointError: they show another one, or none.
    """
    stated, shown = config.get(key, default), set(sizes)
    if shown != {stated}:
        found = " ".join(map(str, sorted(shown))) or "none"
        raise CheckpointError(
            f"{key} = {stated!r}, and its tensors show {found}",
            hint="save it again with PEFT, or copy it anew",
        )
    return int(stated)


def seeded(config: Mapping[str, Any], key: str, default: int, *, more: int = 0) -> torch.Generator:
    """Return a generator that begins at a configuration's seed, or some numbers after it.

    Raises:
        CheckpointError: the seed is no whole number of a machine word.
    """
    seed = config.get(key, default)
    if not isinstance(seed, int) or not 0 <= seed < 2**62:
        raise CheckpointError(f"{key} = {seed!r} is no seed", hint="copy the folder anew")
    return torch.Generator().manual_seed(seed + more)


_FORMS: dict[str, Form] = {}
F = TypeVar("F", bound=type[Form])


def form(cls: F) -> F:
    """Register a form under its method's name."""
    _FORMS[cls.method.name] = cls()
    return cls


def forms() -> dict[str, Form]:
    """Return every form by our name of its method; the first call loads the files of ``forms/``."""
    room = importlib.import_module("addenda.export.peft.forms")
    for module in pkgutil.iter_modules(room.__path__):
        importlib.import_module(f"{room.__name__}.{module.name}")
    return dict(sorted(_FORMS.items()))


def form_for(method: Method) -> Form | None:
    """Return the form of a method, or None where PEFT has none."""
    found = forms().get(method.name)
    return found if found is not None and isinstance(method, found.method) else None


def form_of(config: Mapping[str, Any]) -> Form | None:
    """Return the form of a configuration of PEFT's, or None."""
    named = (found for found in forms().values() if found.peft_type == config.get("peft_type"))
    return next((found for found in named if found.claims(config)), None)
