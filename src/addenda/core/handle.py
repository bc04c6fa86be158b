"""The handle: one attached adapter, and everything that can be done to it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from addenda.core.building import COMMON
from addenda.core.composition import Stack
from addenda.core.contract import Adapter, Method
from addenda.core.host import (
    Host,
    HostState,
    PaddedEncoder,
    Selection,
    adapter_prefixes,
    pad_encoders,
    remove,
    require_module,
    running_on,
)
from addenda.core.merging import copy_of, fold_into, tied, write
from addenda.core.mixing import Resting, require_apart, require_unmixed, rest, wake
from addenda.core.preview import Preview
from addenda.core.tokens import TokenWatch
from addenda.core.views import LayerView
from addenda.core.whole import is_whole
from addenda.errors import MethodError

__all__ = ["Handle", "handles", "tokens_kept"]


class Handle:
    """One adapter on a model: its parameters, and its switch.

    Made by :func:`addenda.attach` and :func:`addenda.load`.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> handle = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"])
        >>> handle
        <Handle 'default': lora, 1 layers, 24 parameters, active>
        >>> handle.disable()
        >>> handle.active
        False
        >>> handle.enable()
        >>> handle.merge()
        >>> handle.merged
        True
        >>> handle.unmerge()
        >>> [name for name, _ in handle.named_parameters()]
        ['0.A', '0.B']
        >>> handle.detach()
        >>> handle.paths
        []
    """

    def __init__(self, model: nn.Module, method: Method, name: str, hosts: dict[str, nn.Module]) -> None:
        self.model = model
        self.method = method
        self.name = name
        self._hosts = hosts
        self.probed = "not run"
        """What the probe batch showed, in words."""

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapter on each layer, by the layer's path."""
        return {path: cast(Adapter, self._host(path).adapters[self.name]) for path in self._hosts}

    @property
    def paths(self) -> list[str]:
        """Paths of the adapted layers, in the model's order."""
        return list(self._hosts)

    @property
    def trainable_parameters(self) -> int:
        """How many numbers train."""
        return sum(p.numel() for p in self.parameters())

    @property
    def through(self) -> str | None:
        """The packed format through which it is trained and answers; None where it stands beside the weight."""
        rounding = next((getattr(adapter, "rounding", None) for adapter in self.adapters.values()), None)
        return None if rounding is None else str(rounding.name)

    @property
    def active(self) -> bool:
        """Whether the adapter changes what the model computes, by running or by being merged."""
        return self.merged or (bool(self._hosts) and self.name in self._selection.composition.names)

    @property
    def merged(self) -> bool:
        """Whether the adapter is folded into the base's weights."""
        return any(self.name in state.merged for state in self._states())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapter's parameters, layer by layer."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ``("<layer path>.<parameter>", parameter)``, layer by layer.

        One that all layers share comes once, as ``"*.<parameter>"``.
        """
        return ((name, value) for name, value in self.tensors().items() if isinstance(value, nn.Parameter))

    def tensors(self, *, training: bool = True) -> dict[str, Tensor]:
        """Return all that is kept of the adapter, the tensors that are not trained too, named likewise.

        Args:
            training: with what only training on needs.
        """
        found: dict[str, Tensor] = {}
        for path, adapter in self.adapters.items():
            for name, value in adapter.state_dict(keep_vars=True).items():
                if not training and name in adapter.training_only:
                    continue
                first, _, rest = name.partition(".")
                found[f"*.{rest}" if first == COMMON and rest else f"{path}.{name}"] = value
        return found

    def rate_of(self, name: str) -> float:
        """Return the method's factor on the learning rate for the parameter of this name."""
        path = name
        while path and path not in self._hosts:
            path = path.rpartition(".")[0]
        path = path or "*"
        return 1.0 if is_whole(self.method, path) else self.method.rate_of(name[len(path) + 1 :])

    def penalty(self) -> Tensor | None:
        """Return what the method adds to the loss of each step, a scalar; None where it adds nothing.

        Asked for once in a step, after its backward passes: what they summed up for it is forgotten then.
        """
        found = self.method.penalty(self.own().adapters)
        self.forget()
        return found

    def sums(self) -> list[Tensor]:
        """Return what the backward passes of a step sum up for the penalty, to be added up over processes."""
        return [adapter.get_buffer(name) for adapter in self.adapters.values() for name in adapter.sums]

    def forget(self) -> None:
        """Forget what was summed up for the penalty, as where the gradients of a step are given up."""
        for total in self.sums():
            total.zero_()

    def after_update(self, *, step: int, of_steps: int) -> None:
        """Let the method change the adapter after an optimiser step, while the step's gradients are still there.

        Args:
            step: the step that was done, counted from 1.
            of_steps: how many there will be.
        """
        with torch.no_grad():
            self.method.after_update(self.own().adapters, step=step, of_steps=of_steps)

    def own(self) -> Handle:
        """Return a handle on those layers alone that the method itself adapts, without those trained whole."""
        return self.without(path for path in self._hosts if is_whole(self.method, path))

    def without(self, paths: Iterable[str]) -> Handle:
        """Return a handle on the other layers alone."""
        left_out = set(paths)
        hosts = {path: module for path, module in self._hosts.items() if path not in left_out}
        return Handle(self.model, self.method, self.name, hosts)

    def enable(self) -> None:
        """Let the adapter run again, in its place in the order of attaching.

        Raises:
            MethodError: it is merged or detached, a mixture runs it, or the active adapters are not a stack.
        """
        self._require_unmerged("enable")
        stack = self._stack("enable")
        self._require_order("enable", merged=False)
        if self.name not in stack:
            attached = list(handles(self.model))
            later = attached[attached.index(self.name) + 1 :]
            place = next((i for i, name in enumerate(stack) if name in later), len(stack))
            wanted = Stack((*stack[:place], self.name, *stack[place:]))
            require_apart(handles(self.model), wanted)
            self._selection.composition = wanted

    def disable(self) -> None:
        """Stop the adapter from running: the model computes what it would without it, bit for bit."""
        self._require_unmerged("disable")
        self._selection.composition = self._selection.composition.without(self.name)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Disable the adapter inside a ``with`` block."""
        self._require_unmerged("disable")
        before = self._selection.composition
        self.disable()
        try:
            yield
        finally:
            self._selection.composition = before

    def merge(self) -> None:
        """Fold the adapter into the base's weights; the original weights are kept for :meth:`unmerge`.

        Raises:
            MethodError: the method cannot be folded, a weight is shared with another layer, an adapter attached
                before it still runs and the order matters, or a folded weight is not finite. The model is then as
                it was.
        """
        self._require_unmerged("merge")
        require_unmixed(handles(self.model), self.name, "merge")
        self._stack("merge")
        self._require_mergeable()
        self._require_order("merge", merged=True)
        self._require_unread("merge")
        folded = {path: self.folded(path) for path in self._hosts}
        for path, (weight, bias) in folded.items():
            state = self._host(path)._addenda
            if state.kept is None:
                state.kept = copy_of(state.view)
            write(state.view, weight, bias)
            state.merged.append(self.name)
        self._selection.composition = self._selection.composition.without(self.name)

    def unmerge(self) -> None:
        """Take the adapter out of the weights again, and let it run; with the last one out they are as they were.

        The original is a kept copy, so nothing is subtracted. Other merged adapters are folded anew.
        """
        self._require_attached("unmerge")
        if not self.merged:
            raise MethodError(
                f"adapter '{self.name}' is not merged", hint="only a merged adapter can be unmerged"
            )
        self._require_order("unmerge", merged=False)
        self._require_unread("unmerge")
        self._unfold()
        self.enable()

    def detach(self) -> None:
        """Take the adapter off; layers without any other are as they were before, class and all.

        Adapters that it mixed train and run again as they did before.

        Raises:
            MethodError: it was detached already, or a mixture stands over it.
        """
        self._require_attached("detach")
        require_unmixed(handles(self.model), self.name, "detach")
        if self.merged:
            self._unfold()
        registry = _registry(self.model)
        running = self.name in registry.selection.composition.names
        registry.selection.composition = registry.selection.composition.without(self.name)
        for module in self._hosts.values():
            remove(module, self.name)
        self._hosts = {}
        registry.handles.pop(self.name, None)
        registry.wake(self.method.mixes(), running=running)
        if registry.preview is not None:
            registry.preview.names.discard(self.name)
        if not registry.handles:
            for watch in (registry.watch, registry.preview):
                if watch is not None:
                    watch.remove()
            _thaw(self.model, registry.thawed)
            for encoder in registry.padded:
                encoder.__class__ = cast(PaddedEncoder, encoder).original_class
            del self.model.__dict__["_addenda_registry"]

    def _unfold(self) -> None:
        for path in self._hosts:
            state = self._host(path)._addenda
            state.merged.remove(self.name)
            self._restore(path, state)

    def _restore(self, path: str, state: HostState) -> None:
        assert state.kept is not None
        write(state.view, *state.kept)
        others = list(state.merged)
        for name in others:
            adapter = cast(Adapter, self._host(path).adapters[name])
            write(state.view, *fold_into(adapter, state.view))
        if not others:
            state.kept = None

    def folded(self, path: str) -> tuple[Tensor, Tensor | None]:
        """Return a layer's weight, as the layer stores it, and bias with the adapter folded in; nothing is written.

        A packed layer's is a dense (d_out, d_in) matrix in the dtype it computes in.

        Raises:
            MethodError: the method has no such weight, or a folded value is not finite.
        """
        host = self._host(path)
        weight, bias = fold_into(cast(Adapter, host.adapters[self.name]), host._addenda.view)
        if not all(bool(torch.isfinite(t).all()) for t in (weight, bias) if t is not None):
            raise MethodError(
                f"folding '{self.name}' into '{path}' gives values that are not finite",
                hint="the adapter holds NaN or infinity, or the base's dtype overflows",
            )
        return weight, bias

    def _require_mergeable(self) -> None:
        if not self.method.mergeable:
            raise MethodError(
                f"method '{self.method.name}' cannot be merged",
                hint="keep the adapter beside its base, or use 'lora'",
            )
        packed = [path for path in self._hosts if not self.view(path).writable]
        if packed:
            raise MethodError(
                f"'{packed[0]}' ({self._host(packed[0]).original_class.__name__}) keeps a quantized weight: "
                "folding into it would round it anew",
                where={"layers": len(packed)},
                hint="keep the adapter beside its base; '--to peft' writes it for other programs",
            )
        made = [path for path in self._hosts if self.view(path).weight_place().parameter is None]
        if made or any(p.is_meta for p in self.parameters()):
            raise MethodError(
                f"the weight of '{made[0]}' is computed from other tensors: there is no place to fold into"
                if made
                else f"adapter '{self.name}' has no values: it is on the meta device",
                hint="remove the parametrization first, or keep the adapter beside its base"
                if made
                else "load the base's values before attaching",
            )
        more = [path for path in self._hosts if not self.view(path).is_plain()]
        if more:
            raise MethodError(
                f"'{more[0]}' ({self._host(more[0]).original_class.__name__}) does more than apply its weight: "
                "no weight gives what the adapter gives",
                where={"layers": len(more)},
                hint="leave such layers out of the targets, or keep the adapter beside its base",
            )
        views = {path: self.view(path) for path in self._hosts}
        shared = [f"'{path}' with '{other}'" for path, other in tied(self.model, views).items()]
        if shared:
            raise MethodError(
                f"merging would also change a layer that shares its weight: {', '.join(shared)}",
                hint="untie the weights first, or keep the adapter beside its base",
            )

    def _require_order(self, verb: str, *, merged: bool) -> None:
        """Refuse a change after which an adapter would take effect before one that it was attached on top of."""
        for path in self._hosts:
            host = self._host(path)
            folded = [n for n in host._addenda.merged if n != self.name] + [self.name] * merged
            running = {*running_on(host), self.name} - set(folded)
            order = list(host.adapters)
            effect = [*folded, *(n for n in order if n in running)]
            for first, second in itertools.combinations(effect, 2):
                both = [cast(Adapter, host.adapters[n]) for n in (first, second)]
                free = all(adapter.additive and not adapter.reads_weight for adapter in both)
                if order.index(first) > order.index(second) and not free:
                    raise MethodError(
                        f"cannot {verb} '{self.name}': '{first}' would then act before '{second}', on which it stands",
                        where={"layer": path, "order of attaching": " ".join(order)},
                        hint="merge in the order of attaching and unmerge in the reverse one, or disable the other",
                    )

    def _stack(self, verb: str) -> tuple[str, ...]:
        """The active adapters, if they are stacked in the order of attaching."""
        composition = self._selection.composition
        attached = [name for name in handles(self.model) if name in composition.names]
        if not isinstance(composition, Stack) or list(composition.names) != attached:
            raise MethodError(
                f"cannot {verb} '{self.name}' while {composition} is active",
                hint="activate the adapters as a stack in the order of attaching first: addenda.activate(model, [...])",
            )
        return composition.names

    @property
    def _selection(self) -> Selection:
        return _registry(self.model).selection

    def _require_unread(self, verb: str) -> None:
        """Refuse to change a weight that an adapter which was attached on top of this one goes by."""
        for path in self._hosts:
            host = self._host(path)
            later = list(host.adapters)[list(host.adapters).index(self.name) + 1 :]
            readers = [n for n in later if cast(Adapter, host.adapters[n]).reads_weight]
            if readers:
                raise MethodError(
                    f"cannot {verb} '{self.name}': '{readers[0]}' on top of it goes by the weight as it is",
                    where={"layer": path, "order of attaching": " ".join(host.adapters)},
                    hint=f"detach '{readers[0]}' first, or attach it after the other is merged",
                )

    def _require_attached(self, verb: str) -> None:
        if not self._hosts:
            raise MethodError(f"cannot {verb} '{self.name}': it was detached", hint="attach or load it again")

    def _require_unmerged(self, verb: str) -> None:
        self._require_attached(verb)
        if self.merged:
            raise MethodError(f"cannot {verb} '{self.name}': it is merged", hint="call unmerge() first")

    def _states(self) -> list[HostState]:
        return [self._host(path)._addenda for path in self._hosts]

    def _host(self, path: str) -> Host:
        return cast(Host, self._hosts[path])

    def view(self, path: str) -> LayerView:
        """Return one of its layers as the adapter sees it."""
        return self._host(path)._addenda.view

    def __repr__(self) -> str:
        through = f", through {self.through}" if self.through else ""
        state = "merged" if self.merged else "active" if self.active else "disabled"
        count = f"{len(self._hosts)} layers, {self.trainable_parameters:,} parameters"
        return f"<Handle '{self.name}': {self.method.name}, {count}{through}, {state}>"


class Registry:
    """What a model remembers of its adapters: the handles, which run, which rest, what was trainable."""

    def __init__(self, model: nn.Module) -> None:
        self.handles: dict[str, Handle] = {}
        self.selection = Selection()
        self.padded: list[nn.Module] = []
        self.watch: TokenWatch | None = None
        self.preview: Preview | None = None
        self.resting: dict[str, Resting] = {}
        inside = adapter_prefixes(model)
        self.thawed = [n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)]

    def rest(self, names: tuple[str, ...]) -> None:
        """Freeze the adapters that a mixture takes over, and let them run no more by themselves."""
        for name in names:
            found = rest(self.handles[name], self.selection.composition)
            self.resting.setdefault(name, found)
            self.selection.composition = self.selection.composition.without(name)

    def wake(self, names: tuple[str, ...], *, running: bool) -> None:
        """Let those that no mixture takes any more be as they were; ``running`` is whether the mixture ran."""
        taken = {name for handle in self.handles.values() for name in handle.method.mixes()}
        for name in names:
            if name not in taken:
                stacked = isinstance(self.selection.composition, Stack)
                wake(self.handles[name], self.resting.pop(name), running=running and stacked)


def _registry(model: nn.Module) -> Registry:
    """Return the model's registry; the first call freezes the base and remembers what was trainable."""
    registry = model.__dict__.get("_addenda_registry")
    if registry is None:
        registry = Registry(model)
        object.__setattr__(model, "_addenda_registry", registry)
        parameters = dict(model.named_parameters())
        for name in registry.thawed:
            parameters[name].requires_grad_(False)
        registry.padded = pad_encoders(model)
    return cast(Registry, registry)


@contextlib.contextmanager
def tokens_kept(model: nn.Module, *, probing: bool = False) -> Iterator[None]:
    """Let calls within the block change nothing of what adapters know of token ids and first passes.

    Args:
        model: carries adapters, or none.
        probing: let every adapter take part meanwhile, whatever the ids.
    """
    registry = model.__dict__.get("_addenda_registry")
    with contextlib.ExitStack() as kept:
        if registry is not None and registry.watch is not None:
            kept.enter_context(registry.watch.kept(probing=probing))
        if registry is not None and registry.preview is not None and not probing:
            kept.enter_context(registry.preview.kept())
        yield


def handles(model: nn.Module) -> dict[str, Handle]:
    """Return the handles of all adapters on the model, by name, in the order of attaching.

    Example:
        >>> import addenda
        >>> model = nn.Sequential(nn.Linear(8, 4))
        >>> _ = addenda.attach(model, addenda.LoRA(rank=2), targets=["0"], name="law")
        >>> list(addenda.handles(model))
        ['law']
    """
    require_module(model)
    registry = model.__dict__.get("_addenda_registry")
    return dict(registry.handles) if registry else {}


def _thaw(model: nn.Module, names: list[str]) -> None:
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:
            parameters[name].requires_grad_(True)
