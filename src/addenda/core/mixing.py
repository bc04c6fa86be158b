"""Mixtures: methods that run adapters which are on the model already, and learn how much of each.

A mixture stands on layers beside the adapters it mixes, and calls them itself. For as long as it is attached they are
frozen, and cannot be merged or taken off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn

from addenda.core.composition import Composition, Once, Stack
from addenda.core.contract import Adapter, Base, Method
from addenda.core.ranges import suffixes
from addenda.errors import MethodError, NotFoundError, nearest

if TYPE_CHECKING:
    from addenda.core.handle import Handle

__all__ = [
    "Mixture",
    "MixtureAdapter",
    "Resting",
    "change_by",
    "paths_of_all",
    "require_apart",
    "require_mixable",
    "require_unmixed",
    "rest",
    "wake",
]


@dataclass(frozen=True)
class Mixture(Method):
    """A method over adapters that are on the model already."""

    of: tuple[str, ...] = ()
    """Names of the adapters it mixes, each once."""

    def mixes(self) -> tuple[str, ...]:
        """Return the names of the adapters it mixes."""
        return self.of

    def problems(self) -> list[str]:
        """Return what is wrong with the names."""
        twice = ["of names an adapter twice"] if len(set(self.of)) < len(self.of) else []
        return suffixes("of", self.of) + twice

    def problems_at(self, base: Base) -> list[str]:
        """Return why it cannot stand here: by default all that it mixes have to."""
        if not self.of:
            return ["it names no adapters to mix: of=('first', 'second')"]
        return [f"there is no adapter '{name}' to mix" for name in self.of if name not in base.others]


class MixtureAdapter(Adapter):
    """What a mixture is on one layer."""

    def __init__(self, of: Sequence[str], base: Base) -> None:
        super().__init__()
        self.of = tuple(name for name in of if name in base.others)
        self.reads_weight = any(base.others[name].reads_weight for name in self.of)

    def changes(self, x: Tensor, base: Base) -> tuple[Tensor, list[Tensor]]:
        """Return what the layer gives for ``x``, and what each of the mixed adapters alone would change of it."""
        once = Once(base, x)
        return once.output, [change_by(base.others[name], x, once) for name in self.of]


def change_by(adapter: Adapter, x: Tensor, once: Once) -> Tensor:
    """Return what an adapter adds to the output of a layer that has run on ``x``; a low-rank term is not subtracted."""
    base, term = cast(Base, once), adapter.low_rank_term()
    if term is None:
        found: Tensor = adapter(x, base) - once.output
        return found
    A, B, scaling = term
    return scaling * base.low_rank(x, A.to(base.dtype), B.to(base.dtype))


@dataclass
class Resting:
    """How an adapter was before a mixture took it over."""

    trained: list[nn.Parameter]
    """Its parameters that wanted gradients."""
    ran: bool


def paths_of_all(on_model: Mapping[str, Handle], method: Method) -> list[str]:
    """Return the layers on which any of the adapters stands that a mixture mixes, without those trained whole.

    Raises:
        NotFoundError, MethodError: as for `require_mixable`.
    """
    require_mixable(on_model, method)
    return list(dict.fromkeys(path for name in method.mixes() for path in on_model[name].own().paths))


def require_mixable(on_model: Mapping[str, Handle], method: Method) -> None:
    """Refuse a mixture of adapters that are not there, or that cannot be mixed.

    Raises:
        NotFoundError: the model carries no adapter of that name; all of them are named.
        MethodError: one is a mixture itself, or merged.
    """
    unknown = [name for name in method.mixes() if name not in on_model]
    if unknown:
        close, missing = nearest(unknown[0], on_model), ", ".join(f"'{name}'" for name in unknown)
        raise NotFoundError(
            f"the model carries no adapter {missing} to mix",
            where={"method": method.name, "adapters": " ".join(on_model) or "none"},
            hint=f"did you mean '{close[0]}'?" if close else "attach or load it first",
        )
    mixed = [f"'{name}' is a mixture itself" for name in method.mixes() if on_model[name].method.mixes()]
    mixed += [f"'{name}' is merged" for name in method.mixes() if on_model[name].merged]
    if mixed:
        raise MethodError(
            f"{'; '.join(mixed)}: method '{method.name}' cannot mix it",
            hint="mix adapters that stand on the layers alone; call unmerge() where one is merged",
        )


def require_unmixed(on_model: Mapping[str, Handle], name: str, verb: str) -> None:
    """Refuse to change an adapter that a mixture runs.

    Raises:
        MethodError: one does.
    """
    over = [other for other, handle in on_model.items() if name in handle.method.mixes()]
    if over:
        raise MethodError(
            f"cannot {verb} '{name}': '{over[0]}' mixes it", hint=f"detach '{over[0]}' first, or save it"
        )


def require_apart(on_model: Mapping[str, Handle], composition: Composition) -> None:
    """Refuse a stack in which an adapter would run by itself, and once more in a mixture.

    Raises:
        MethodError: it would.
    """
    if not isinstance(composition, Stack):
        return
    for name in composition.names:
        twice = [other for other in on_model[name].method.mixes() if other in composition.names]
        if twice:
            raise MethodError(
                f"'{twice[0]}' would run twice: by itself, and as one of those that '{name}' mixes",
                hint=f"activate '{name}' alone, or '{twice[0]}' without it",
            )


def rest(handle: Handle, composition: Composition) -> Resting:
    """Freeze an adapter that a mixture takes over, and return how it was."""
    trained = [parameter for parameter in handle.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    return Resting(trained, handle.name in composition.names)


def wake(handle: Handle, resting: Resting, *, running: bool) -> None:
    """Give an adapter back what the last mixture over it took; it runs again if it did and the mixture does."""
    for parameter in resting.trained:
        parameter.requires_grad_(True)
    if running and resting.ran and not handle.active:
        handle.enable()
