"""The contract every method is written against: Method, Adapter, Base.

A method is the maths of one paper. It sees the layer under it only through :class:`Base`: it may call it, read its
weight as a matrix, and run its operation again with another or a factored weight. It cannot write to it, and it does
not know which kind of layer or weight format it stands on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from addenda.core.observations import Needs, Observer
from addenda.core.preview import Preview
from addenda.core.prompts import Prompts
from addenda.core.ranges import suffixes
from addenda.core.tokens import TokenWatch
from addenda.errors import ConfigError, MethodError, nearest

if TYPE_CHECKING:
    from addenda.core.terms import Addend

__all__ = ["Adapter", "Base", "Initializer", "Method", "ParameterSource"]

Initializer = Callable[[Tensor, torch.Generator], object]
"""Fills a tensor in place, drawing all randomness from the generator; not called where saved values will follow."""


class ParameterSource:
    """Makes an adapter's tensors, on one device, in one dtype.

    Random values depend on the seed, the label and the order of the calls only, never on the global generator.
    """

    def __init__(
        self, seed: int, label: str, *, device: torch.device, dtype: torch.dtype, initialize: bool = True
    ) -> None:
        self._seed, self._label = seed, label
        self.device, self.dtype = device, dtype
        self._initialize = initialize
        self._drawn = 0

    def parameter(self, *shape: int, init: Initializer | float = 0.0) -> nn.Parameter:
        """Make a tensor that is trained."""
        return nn.Parameter(self.constant(*shape, init=init))

    def constant(
        self, *shape: int, init: Initializer | float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Make a tensor that is not trained, for ``register_buffer``; of whole numbers where ``dtype`` says so."""
        self._drawn += 1
        kind = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(shape, dtype=kind, device=self.device)
        value = torch.zeros(shape, dtype=kind)
        if not self._initialize:  # saved values will be written over it
            return value.to(self.device)
        if callable(init):
            init(value, _generator(self._seed, self._label, self._drawn))
        else:
            value.fill_(init)
        return value.to(self.device)


class Base(ABC):
    """What an adapter sees of the layer it stands on; it can read and call, never write.

    The weight is always shown as a matrix of shape (d_out, d_in), output channel first, dequantized. For a
    convolution d_in is the kernel volume times the input channels of one group; for an embedding it is the number of
    rows (an embedding is a linear map of one-hot vectors).
    """

    path: str
    """Dotted path of the layer in its model."""
    kind: str
    """Name of the layer kind, as in ``core/layers``."""
    routed: ClassVar[bool] = False
    """Whether the layer is given only those rows that a router sends it, in an order of their own."""
    common: nn.Module | None
    """What the adapters of all layers share, as :meth:`Method.build_common` made it."""
    observed: Mapping[str, Tensor] | None
    """What an :class:`Observer` found out about the layer beforehand."""

    watch: TokenWatch | None
    """Tells the token ids of the pass that runs, where a method :meth:`~Method.reads_tokens`."""
    preview: Preview | None
    """Tells the hidden states of a first pass, where a method :meth:`~Method.looks_ahead`."""

    def __init__(
        self, *, seed: int = 0, parameter_device: torch.device | None = None, initialize: bool = True
    ) -> None:
        self._seed = seed
        self._parameter_device = parameter_device
        self.initialize = initialize
        """Whether the adapter's values count; False where saved ones are about to be written over them."""
        self._source: ParameterSource | None = None
        self.common = None
        self.observed = None
        self.watch = None
        self.preview = None

    @property
    @abstractmethod
    def d_in(self) -> int:
        """Columns of the weight matrix."""

    @property
    @abstractmethod
    def d_out(self) -> int:
        """Rows of the weight matrix."""

    @property
    @abstractmethod
    def channels_in(self) -> int | None:
        """Features of the layer's input, or None where the input holds indices rather than features."""

    @property
    @abstractmethod
    def channels_out(self) -> int:
        """Features of the layer's output."""

    @property
    def others(self) -> Mapping[str, Adapter]:
        """The adapters on the layer, by name: where a method mixes some, it finds them here."""
        return {}

    @property
    def groups(self) -> int:
        """Into how many groups a convolution divides its channels; 1 for every other kind."""
        return 1

    @property
    def kernel_volume(self) -> int:
        """How many positions of the input an output position reads: more than 1 for convolutions alone."""
        return 1 if self.channels_in is None else self.d_in * self.groups // self.channels_in

    @property
    def pointwise(self) -> bool:
        """Whether the weight maps the features in the input's last dimension to those in the output's, W x."""
        return False

    @property
    @abstractmethod
    def has_bias(self) -> bool:
        """Whether the layer adds a bias."""

    @property
    def bias_possible(self) -> bool:
        """Whether the layer has a bias, or can be given one."""
        return True

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the layer's weight is."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer as it is: the layer's own input -> its own output."""

    @abstractmethod
    def weight(self) -> Tensor:
        """Return the weight as a dense (d_out, d_in) matrix, detached."""

    @abstractmethod
    def bias(self) -> Tensor | None:
        """Return the bias of shape (d_out,), detached, or None."""

    @abstractmethod
    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Run the layer's operation on ``x`` with another (d_out, d_in) ``weight`` and ``bias``."""

    @abstractmethod
    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Run the layer's operation with the weight B A, never forming it. A: (rank, d_in), B: (d_out, rank)."""

    def add_low_rank(self, x: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
        """Return ``base(x) + scaling * low_rank(x, A, B)`` in the layer's dtype; fused where the kind can."""
        return self(x) + scaling * self.low_rank(x, A.to(self.dtype), B.to(self.dtype))

    def add_low_ranks(self, x: Tensor, parts: Sequence[Addend]) -> Tensor | None:
        """Return ``base(x)`` with the terms of several adapters, each on rows of its own, where the kind can fuse
        that, else None."""
        return None

    def mapped(self, rows: Tensor) -> Tensor:
        """Return rows W^T, (n, d_out), for rows (n, d_in): the frozen weight's product without a bias; no gradient.

        Cheaper than :meth:`weight` where that has to be unpacked. In the layer's dtype.
        """
        with torch.no_grad():
            return rows.to(self.dtype) @ self.weight().t()

    def add_weight(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what the layer gives for ``x`` with ``weight`` (d_out, d_in) and ``bias`` (d_out,) added to its own.

        They may be wider than the layer's dtype: the sum is rounded once. Give no bias where the layer has none.
        """
        return self(x) + self.apply(x, weight.to(self.dtype), None if bias is None else bias.to(self.dtype))

    def tied_to(self, other: Base) -> bool:
        """Whether both layers hold one and the same weight."""
        return self is other

    def prompts(self, y: Tensor) -> Prompts:
        """Return where the prompts lie in the layer's output ``y``, (rows, tokens, features); each row, if unknown."""
        return Prompts.of_rows(torch.ones(y.shape[:2], dtype=torch.bool, device=y.device))

    def inputs_last(self, x: Tensor) -> Tensor:
        """View the layer's input with its channels in the last dimension: (..., channels_in)."""
        return x

    def inputs_back(self, x: Tensor) -> Tensor:
        """Undo :meth:`inputs_last`."""
        return x

    def outputs_last(self, y: Tensor) -> Tensor:
        """View the layer's output with its channels in the last dimension: (..., channels_out)."""
        return y

    def outputs_back(self, y: Tensor) -> Tensor:
        """Undo :meth:`outputs_last`."""
        return y

    def parameter(self, *shape: int, init: Initializer | float = 0.0) -> nn.Parameter:
        """Make a trainable parameter for an adapter on this layer.

        It lives on the layer's device, in the layer's dtype, or in float32 where the layer's is narrower. Random
        values depend on the seed, the layer's path and the order of the calls only, never on other layers or on the
        global generator.
        """
        return self.source().parameter(*shape, init=init)

    def constant(
        self, *shape: int, init: Initializer | float = 0.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Make a tensor likewise that is kept beside the parameters and not trained, for ``register_buffer``."""
        return self.source().constant(*shape, init=init, dtype=dtype)

    def source(self, label: str | None = None) -> ParameterSource:
        """Return what makes the adapter's tensors on this layer, or with a label a new one of its own."""
        if label is None and self._source is not None:
            return self._source
        device = self._parameter_device or self.device
        dtype = (
            torch.promote_types(self.dtype, torch.float32) if self.dtype.is_floating_point else torch.float32
        )
        made = ParameterSource(
            self._seed,
            self.path if label is None else label,
            device=device,
            dtype=dtype,
            initialize=self.initialize,
        )
        if label is None:
            self._source = made
        return made


def _generator(seed: int, path: str, drawn: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{path}/{drawn}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Adapter(nn.Module):
    """The trained parameters of one method on one layer, and how they change what the layer computes."""

    additive: bool = False
    """Whether it adds to the output a term that depends on the layer's input and weight alone, so that the order in
    which it and others like it stand on a layer does not matter."""
    may_rest: bool = False
    """Whether a batch may well leave it without a gradient, as one in which none of its tokens occurs."""
    reads_weight: bool = False
    """Whether what it computes depends on the layer's weight or bias itself, so that none may be folded in below it."""
    training_only: tuple[str, ...] = ()
    """Names of the buffers that only training on needs: checkpoints of a run keep them, a saved adapter does not."""
    sums: tuple[str, ...] = ()
    """Names of the buffers, not persistent, to which the backward passes of a step add what `Method.penalty` needs.
    They add up over micro-batches and processes, and are set to zero when the penalty was asked for."""
    by_place: bool = False
    """Whether what it does to a row depends on where the row stands in the batch, so that it has to see all rows."""
    common: nn.Module | None
    """What it shares with the adapters on the other layers: one module, set after :meth:`Method.build`."""
    _tied_weights_keys: ClassVar[Mapping[str, str]] = {r"common\.": "common"}
    """Tells transformers that a model's state names those tensors more than once, so that it writes each once."""

    def __init__(self) -> None:
        super().__init__()
        self.common = None  # of the object: a class's attribute would hide the module

    def hold(self, **tensors: Tensor | None) -> None:
        """Keep tensors under these names: parameters to be trained, others as they are."""
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Return the adapted output for the layer's input ``x``; shapes as the layer's own."""
        raise MethodError(
            f"{type(self).__name__} defines no forward", hint="an adapter must implement forward(x, base)"
        )

    def low_rank_term(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A, B and the scaling if forward now does ``base.add_low_rank`` with them and nothing else."""
        return None

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the (d_out, d_in) weight and (d_out,) bias with which the bare layer computes the same.

        Raises:
            MethodError: the method has no such weight.
        """
        raise MethodError(
            f"{type(self).__name__} cannot be folded into a weight",
            hint="keep the adapter beside its base, or use a mergeable method such as 'lora'",
        )


@dataclasses.dataclass(frozen=True)
class Method(ABC):
    """The settings of one PEFT method; subclasses are frozen dataclasses registered under a name.

    Class attributes say what the method can do. The conformance tests, the command line and the reference pages read
    them, so an exception is declared once, here, with its reason.
    """

    name: ClassVar[str] = ""
    """The registered name; set by :func:`addenda.core.registry.register`."""
    mergeable: ClassVar[bool] = False
    """Whether its adapters can be folded into the weight."""
    learning_rate: ClassVar[float] = 1e-3
    """Peak learning rate that suits the method when the user names none (AdamW)."""
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d-transposed", "conv", "embedding")
    """Layer kinds it can adapt."""
    variants: ClassVar[tuple[Mapping[str, object], ...]] = ({},)
    """Settings under which the conformance tests run it."""
    exceptions: ClassVar[Mapping[str, str]] = {}
    """Conformance properties it does not have, each with the reason."""

    whole: tuple[str, ...] = dataclasses.field(default=(), kw_only=True)
    """Literal suffixes of layers, or of modules full of them, that are trained whole instead, such as a head."""

    def __post_init__(self) -> None:
        found = suffixes("whole", self.whole) + self.problems()
        if found:
            raise ConfigError(
                "; ".join(found), where={"method": self.name or type(self).__name__}, hint=self._hint()
            )

    @abstractmethod
    def build(self, base: Base) -> Adapter:
        """Make the adapter for one layer; all parameters come from ``base.parameter``."""

    def build_common(self, bases: Sequence[Base], source: ParameterSource) -> nn.Module | None:
        """Make what the adapters of all these layers share, or None; its tensors come from ``source``.

        Called once before ``build``, which finds it as ``base.common``. It is counted, saved and trained once.
        """
        return None

    def usual_rate(self) -> float:
        """Return the peak learning rate that suits these settings when the user names none (AdamW)."""
        return self.learning_rate

    def needs(self) -> Needs | None:
        """Return what the first values are computed from; None where they are drawn or fixed."""
        return None

    def observer(self, base: Base) -> Observer:
        """Return what gathers what ``build`` will find as ``base.observed``; asked of methods that need such."""
        raise MethodError(f"method '{self.name}' observes nothing", hint="attach it as it is")

    def rows_to_observe(self) -> int:
        """Return on how many rows of data a run should observe what is needed."""
        return 64

    def settled(self, layers: Mapping[str, Mapping[str, Tensor]]) -> Self:
        """Return the method with the settings that follow from what was observed of each layer, by path."""
        return self

    def reads_tokens(self) -> bool:
        """Whether its adapters ask ``base.watch`` for the token ids of the pass that runs."""
        return False

    def looks_ahead(self) -> bool:
        """Whether its adapters ask ``base.preview`` for the hidden states of a pass before the one that counts."""
        return False

    def mixes(self) -> tuple[str, ...]:
        """Return the names of the adapters that it runs itself, which are then frozen and do not run on their own."""
        return ()

    def rate_of(self, parameter: str) -> float:
        """Return the factor on the learning rate for the adapter's parameter of this name, such as ``"B"``."""
        return 1.0

    def penalty(self, adapters: Mapping[str, Adapter]) -> Tensor | None:
        """Return a scalar whose gradient joins that of the loss in each step, given the adapters by path; or None."""
        return None

    def after_update(  # noqa: B027  (most methods have nothing to do here)
        self, adapters: Mapping[str, Adapter], *, step: int, of_steps: int
    ) -> None:
        """Change the adapters after optimiser step ``step``, counted from 1; the step's gradients are still there.

        What it has to remember lies in buffers of the adapters, so that a resumed run goes on with the same bits.
        """

    def problems(self) -> list[str]:
        """Return what is wrong with the settings themselves, one short sentence each."""
        return []

    def problems_at(self, base: Base) -> list[str]:
        """Return why the method cannot be put on this layer, one short sentence each."""
        return []

    def problems_among(self, paths: Sequence[str]) -> list[str]:
        """Return what is wrong with the settings for these layers taken together, one short sentence each."""
        return []

    @property
    def positions(self) -> int:
        """How many positions it puts in front of every sequence: so much less of a context is left."""
        return 0

    def with_tokens(self, encode: Callable[[str], Sequence[int]]) -> Self:
        """Return the method with the tokens of the texts that its settings hold, or as it is where they hold none."""
        return self

    def layer_kinds(self) -> tuple[str, ...]:
        """Return the layer kinds these settings can adapt."""
        return self.kinds

    def default_targets(self, paths: Sequence[str]) -> str | list[str]:
        """Return the targets to use when the user names none, given the paths of all adaptable layers."""
        return "all-linear"

    def settings(self) -> dict[str, object]:
        """Return the settings as plain values that JSON and TOML can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_settings(cls, settings: Mapping[str, object]) -> Self:
        """Make the method from plain values.

        Raises:
            ConfigError: a setting is unknown, of a wrong type, or out of range.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [key for key in settings if key not in known]
        if unknown:
            close = nearest(unknown[0], known)
            raise ConfigError(
                f"unknown settings {unknown} of method '{cls.name}'",
                where={"settings": " ".join(known)},
                hint=f"did you mean '{close[0]}'?" if close else "remove them, or see 'addenda methods'",
            )
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        return cls(**values)

    def _hint(self) -> str:
        return f"see 'addenda methods {self.name}' for the range of each setting"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value
