"""The record of a run: everything the report says, as plain values that go to JSON and back unchanged."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from addenda.errors import CheckpointError
from addenda.evals.overfitting import Learning
from addenda.evals.results import HeldoutChange, KLEstimate, SamplePair
from addenda.intervals import Interval

__all__ = [
    "BaseFacts",
    "CostFacts",
    "CurvePoint",
    "Curves",
    "DataFacts",
    "ExportFacts",
    "FindingCount",
    "LayerFacts",
    "MethodFacts",
    "RecipeValue",
    "RunRecord",
    "SeedFacts",
    "SeedFigure",
]


@dataclass(frozen=True)
class BaseFacts:
    """The model that was adapted."""

    name: str
    source: str
    """Where it came from: a registry name, a path or a hub id."""
    license: str
    kind: str
    """``causal-lm`` or ``encoder``."""
    dtype: str
    """Number format of its weights while training, for example ``bfloat16``."""
    parameters: int
    """Parameters of the base alone."""
    fingerprint: str
    notes: tuple[str, ...] = ()
    """What was done to its weights on loading."""


@dataclass(frozen=True)
class LayerFacts:
    """One adapted layer."""

    path: str
    kind: str
    shape: tuple[int, ...]
    """Of the layer's weight."""
    parameters: int
    """Trained on this layer."""
    bytes: int
    """Taken by them."""


@dataclass(frozen=True)
class MethodFacts:
    """How it was adapted, and what that took."""

    name: str
    summary: str
    settings: dict[str, str | int | float | bool | None]
    layers: tuple[LayerFacts, ...]
    trainable_parameters: int
    total_parameters: int
    """Base and adapter together."""
    adapter_bytes: int
    """Size of the adapter's file."""


@dataclass(frozen=True)
class CurvePoint:
    """One measurement while training."""

    step: int
    """Optimizer steps taken before it; 0 is the base."""
    nll: float
    """Nats per trained token."""


@dataclass(frozen=True)
class Curves:
    """The loss while training."""

    train: tuple[CurvePoint, ...]
    """Of each step's own global batch, measured before that step's update."""
    heldout: tuple[CurvePoint, ...]
    kept_step: int | None = None
    """The step whose adapter was kept, or None when it is the last one."""
    stopped: str = ""
    """Why training ended, as it reads after the word because."""


@dataclass(frozen=True)
class FindingCount:
    """One kind of problem seen in the data."""

    code: str
    severity: str
    count: int
    example: str
    """The first one, as it was reported."""


@dataclass(frozen=True)
class DataFacts:
    """What it was trained and measured on."""

    source: str
    sha256: str
    shape: str
    """As detected: chat, sharegpt, alpaca, prompt-completion, text."""
    rows: int
    train_rows: int
    heldout_rows: int
    split: str
    """How the held-out rows were chosen, in words."""
    dropped_rows: int
    cut_rows: int
    max_tokens: int
    """Longest row allowed; 0 where no limit was set."""
    trained_tokens: int
    """Tokens of the training rows that the model learned to predict, one pass."""
    all_tokens: int
    """The same with the context around them, one pass."""
    findings: tuple[FindingCount, ...] = ()


@dataclass(frozen=True)
class CostFacts:
    """What the run took."""

    wall_seconds: float
    """From start to report; of parts before a resume, the training alone."""
    train_seconds: float
    """Of it in training, with its evaluations and checkpoints."""
    tokens_per_second: float
    """Trained and context tokens a second while training."""
    trained_tokens: int
    """Over all epochs."""
    steps: int
    epochs: float
    peak_rss_bytes: int
    machine: str
    """Processor, cores in use, memory."""
    precision: str
    """Number format of the base's arithmetic and why it was chosen."""


@dataclass(frozen=True)
class SeedFigure:
    """One figure over the seeds that a recipe was trained with."""

    name: str
    """In words, with its unit."""
    key: str
    """As in ``summary.json``."""
    values: tuple[float, ...]
    """One for each seed that came to its end."""
    mean: Interval
    """With Student's interval over the seeds."""


@dataclass(frozen=True)
class SeedFacts:
    """The same recipe with several seeds, on the same held-out rows."""

    seeds: tuple[int, ...]
    """Those that came to their end; the first one's adapter is the run's."""
    figures: tuple[SeedFigure, ...]
    failed: dict[str, str]
    """The other seeds, and why they ended."""


@dataclass(frozen=True)
class ExportFacts:
    """One export of the run's adapter, as the gate found it."""

    format: str
    type: str
    """Of the written numbers; empty where the format has no choice."""
    checked: str
    """Date and time, ISO 8601."""
    version: str
    """Of the Addenda that wrote it."""
    verdict: str
    """``passed``, ``drifted``, ``failed``, ``unproven`` or ``unverified``."""
    words: str
    """The verdict in a sentence."""
    kept: bool
    """Whether its files were left where they were to be."""
    bytes: int
    runtime: str
    """The program that answered, with its version."""
    twin_difference: float | None
    """Largest difference of an answer where nothing is rounded; None where none was asked, or it was no number."""
    twin_limit: float | None
    """What it may be."""
    kl: Interval | None
    """Of the file's answers from the trained model's, nats per position; None where they are no probabilities."""
    top1_agreement: float | None
    """Share in [0, 1] of positions with the same first choice."""
    effect_size: Interval | None
    """How much of the adapter's change of the answers the file keeps, 1 being all of it."""
    effect_cosine: Interval | None
    """Cosine of the change that the file makes with the change that the adapter makes."""


@dataclass(frozen=True)
class RecipeValue:
    """One setting of the resolved recipe."""

    key: str
    value: str
    origin: str
    """default, file, --set, or what it was derived from."""


@dataclass(frozen=True)
class RunRecord:
    """A run, as its report shows it."""

    name: str
    finished: str
    """Date and time, ISO 8601."""
    version: str
    """Of Addenda."""
    base: BaseFacts
    method: MethodFacts
    heldout: HeldoutChange
    learning: Learning
    curves: Curves
    general: KLEstimate
    samples: tuple[SamplePair, ...]
    data: DataFacts
    cost: CostFacts
    environment: dict[str, str] = field(default_factory=dict)
    recipe: tuple[RecipeValue, ...] = ()
    command: str = ""
    """The command line that made it, if one did."""
    seeds: SeedFacts | None = None
    """None where it was trained with one seed."""
    exports: tuple[ExportFacts, ...] = ()
    """The latest in each format and type."""

    def to_json(self) -> str:
        """Return the record as JSON that `from_json` reads back into an equal record."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> RunRecord:
        """Read a record that `to_json` wrote.

        Raises:
            CheckpointError: the text is no record, or one of another version; every wrong field is named.
        """
        import pydantic

        try:
            return pydantic.TypeAdapter(RunRecord).validate_json(text)
        except pydantic.ValidationError as error:
            problems = {
                ".".join(str(part) for part in problem["loc"]) or "record": problem["msg"].lower()
                for problem in error.errors()
            }
            raise CheckpointError(
                "the run record cannot be read",
                where=problems,
                hint="it was cut off, edited, or written by another version",
            ) from None
