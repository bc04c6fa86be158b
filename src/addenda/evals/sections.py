"""The report's sections, each a list of page elements made from the run's record."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from addenda.evals.charts import Series, bar, line_chart
from addenda.evals.page import (
    Html,
    bytes_of,
    count,
    duration,
    folded,
    interval_text,
    moment,
    prose,
    table,
    tag,
)
from addenda.evals.record import ExportFacts, LayerFacts, RunRecord, SeedFacts
from addenda.evals.results import PromptShift, SamplePair

__all__ = [
    "answers",
    "cost",
    "curves",
    "data",
    "environment",
    "exported",
    "general",
    "limits",
    "over_seeds",
    "trained",
]


def curves(record: RunRecord) -> list[Html]:
    """Train and held-out nll per token over optimizer steps."""
    found = record.curves
    if not found.train and not found.heldout:
        return [tag("p", "No loss was recorded while training.")]
    lines = [
        Series(
            "training, each step's batch", "train", tuple((point.step, point.nll) for point in found.train)
        ),
        Series("held-out rows", "heldout", tuple((point.step, point.nll) for point in found.heldout)),
    ]
    kept = found.kept_step
    chart = line_chart(
        lines,
        title="Loss curves: nll per trained token against optimizer steps, for training batches and held-out rows",
        x_label="optimizer steps taken",
        y_label="nats per trained token",
        mark=None if kept is None else (kept, f"kept: step {count(kept)}"),
    )
    rows = [[count(point.step), f"{point.nll:.4f}"] for point in found.heldout]
    intro = "The first held-out point, at step 0, is the base before any training."
    ended = f" Training ended because {found.stopped}." if found.stopped else ""
    return [
        tag("p", intro + ended),
        tag("div", chart, class_="scroll", role="region", tabindex="0", aria_label="Chart of the loss"),
        folded(
            "Held-out points as a table",
            table("Held-out nll in nats per trained token", ["step", "nll"], rows, numeric=(1,)),
        ),
    ]


def answers(record: RunRecord) -> list[Html]:
    """Held-out questions answered by the base and by the adapted model."""
    if not record.samples:
        return [
            tag(
                "p",
                "No question was asked: the base has no chat template, or no held-out row ends with an answer.",
            )
        ]
    intro = (
        f"{len(record.samples)} held-out questions, answered by both models with greedy decoding (at each step the "
        "most likely token). They were picked to differ from one another, before any answer was seen."
    )
    return [tag("p", intro), *(_pair(number, pair) for number, pair in enumerate(record.samples, start=1))]


def _pair(number: int, pair: SamplePair) -> Html:
    *earlier, (_, question) = pair.messages
    context = [
        tag("div", tag("span", role, class_="who"), prose(content), class_="turn")
        for role, content in earlier
    ]
    asked = tag(
        "div",
        tag("h3", f"Question {number}"),
        *context,
        tag("div", prose(question), class_="question"),
        class_="asked",
    )
    both = tag(
        "div",
        tag("div", tag("h4", "Before: the base"), prose(pair.before), class_="before"),
        tag("div", tag("h4", "After: the adapted model"), prose(pair.after), class_="after"),
        class_="answers",
    )
    reference = tag("div", tag("h4", "Answer in the data"), prose(pair.reference), class_="reference")
    return tag("article", asked, both, reference, class_="pair")


def general(record: RunRecord) -> list[Html]:
    """KL from the base on the shipped general prompts."""
    kl = record.general
    ratio = math.exp(kl.mean)
    intro = (
        f"On {len(kl.prompts)} general prompts (everyday questions, explanations, code, sums) the predictions "
        f"moved by {kl.mean:.4f} nats per token from the base ("
        f"{interval_text(kl.interval, digits=4, sign=False)} over prompts; "
        f"{count(kl.tokens)} positions behind the template's opening, full vocabulary)."
    )
    meaning = (
        "This is the mean Kullback-Leibler divergence KL(base || adapted). Zero means the same probabilities for every "
        f"next token. A mean of {kl.mean:.4f} means that the adapted model gives the tokens the base would write a "
        f"probability {ratio:.3g} times smaller on (geometric) average. Both models name the same most likely next "
        f"token at {kl.agreement:.1%} of the positions. Where the prompts' answers are written, the mean is "
        f"{kl.answer_mean:.4f}."
    )
    if kl.skipped:
        intro += f" {kl.skipped} more could not be written in the base's chat template or context."
    moved = sorted(kl.prompts, key=lambda shift: -shift.kl_per_token)[:5]
    return [
        tag("p", intro),
        tag("p", meaning),
        _topics(kl.prompts),
        folded(
            "The prompts it moved most on",
            table(
                "The five general prompts with the largest mean KL",
                ["prompt", "topic", "nats per token"],
                [[shift.prompt, shift.topic, f"{shift.kl_per_token:.4f}"] for shift in moved],
                numeric=(2,),
            ),
        ),
    ]


def _topics(prompts: Iterable[PromptShift]) -> Html:
    topics: dict[str, list[PromptShift]] = {}
    for shift in prompts:
        topics.setdefault(shift.topic, []).append(shift)
    means = {
        topic: sum(shift.kl_sum for shift in shifts) / sum(shift.tokens for shift in shifts)
        for topic, shifts in topics.items()
    }
    largest = max(means.values()) or 1.0
    rows = [
        [topic, bar(mean / largest), f"{mean:.4f}", str(len(topics[topic]))]
        for topic, mean in sorted(means.items(), key=lambda item: -item[1])
    ]
    head = ["topic", "", "nats per token", "prompts"]
    return table(
        "Mean KL by topic; the topics are small, so small differences mean nothing",
        head,
        rows,
        numeric=(2, 3),
    )


def trained(record: RunRecord) -> list[Html]:
    """Method, layers, parameters, bytes."""
    method, base = record.method, record.base
    share = method.trainable_parameters / method.total_parameters
    text = (
        f"Method {method.name}. {method.summary.rstrip('.')}. {len(method.layers)} layers of {base.name} were adapted; "
        f"{count(method.trainable_parameters)} parameters were trained, {share:.2%} of "
        f"{count(method.total_parameters)}. The base's own {count(base.parameters)} parameters stayed frozen. "
        f"The adapter's file takes {bytes_of(method.adapter_bytes)}."
    )
    given = {
        key: value for key, value in method.settings.items() if value not in (None, "", "{}", "()", "[]")
    }
    settings = ", ".join(f"{key} = {value}" for key, value in given.items())
    layers = [
        [layer.path, layer.kind, _shape(layer), count(layer.parameters), bytes_of(layer.bytes)]
        for layer in method.layers
    ]
    head = ["layer", "kind", "weight", "trained parameters", "size"]
    return [
        tag("p", text),
        tag("p", f"Settings: {settings}." if settings else "The method's settings are all left open."),
        _groups(method.layers),
        folded(f"All {len(layers)} layers", table("Adapted layers", head, layers, numeric=(2, 3, 4))),
    ]


def _groups(layers: Iterable[LayerFacts]) -> Html:
    """Layers of one name and shape in one line: 24 times q_proj is one fact."""
    parameters: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    numbers: Counter[tuple[str, str]] = Counter()
    for layer in layers:
        key = (layer.path.rpartition(".")[2], _shape(layer))
        parameters[key] += layer.parameters
        sizes[key] += layer.bytes
        numbers[key] += 1
    rows = [
        [
            name,
            count(numbers[name, shape]),
            shape,
            count(parameters[name, shape]),
            bytes_of(sizes[name, shape]),
        ]
        for name, shape in numbers
    ]
    head = ["layers named", "number", "weight", "trained parameters", "size"]
    return table("What was adapted, by layer name", head, rows, numeric=(1, 2, 3, 4))


def _shape(layer: LayerFacts) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(str(size) for size in layer.shape)


def over_seeds(facts: SeedFacts) -> list[Html]:
    """How much the figures differ from seed to seed."""
    rows = [
        [
            figure.name,
            f"{figure.mean.value:.4f}",
            interval_text(figure.mean, digits=4, sign=False).removeprefix("95% interval "),
            *(f"{value:.4f}" for value in figure.values),
        ]
        for figure in facts.figures
    ]
    intro = (
        f"The recipe was trained with {count(len(facts.seeds))} seeds, which decide initial values, order of the rows "
        "and dropout; the held-out rows are the same. The intervals are Student's over the seeds: where the mean of "
        "many more seeds would lie. All other sections show the first seed, whose adapter is the one kept."
    )
    ended = [tag("p", f"Seed {seed} ended early: {reason}.") for seed, reason in facts.failed.items()]
    head = ["figure", "mean", "95% interval", *(f"seed {seed}" for seed in facts.seeds)]
    numeric = (1, *range(3, len(head)))
    return [tag("p", intro), table("Figures over the seeds", head, rows, numeric=numeric), *ended]


def exported(exports: Iterable[ExportFacts]) -> list[Html]:
    """What other programs answer that load the adapter, and what its files have lost."""
    made = sorted(exports, key=lambda each: (each.format, each.type))
    intro = (
        "Each export is loaded in the program it is for, where that is installed, and asked texts that nobody trained "
        "on; its answers are compared with the trained model's. The latest in each format and type is shown."
    )
    verdicts = [
        [
            _form(each),
            bytes_of(each.bytes),
            tag("strong", _fate(each)),
            each.words,
            each.runtime,
            f"{moment(each.checked)}, Addenda {each.version}",
        ]
        for each in made
    ]
    figures = [
        [
            _form(each),
            _with_limit(each),
            f"{each.kl:.2g}" if each.kl else "",
            "" if each.top1_agreement is None else f"{each.top1_agreement:.1%}",
            f"{each.effect_size:.1%}",
            f"{each.effect_cosine:.3f}",
        ]
        for each in made
        if each.effect_size and each.effect_cosine
    ]
    return [
        tag("p", intro),
        table(
            "What the gate says",
            ["export", "size", "verdict", "in words", "loaded with", "checked"],
            verdicts,
            numeric=(1,),
        ),
        *([table(_GATE, _GATE_HEAD, figures)] if figures else []),
        tag("p", _GATE_NOTE, class_="note"),
    ]


_GATE = "What the gate measured, with 95% intervals over texts"
_GATE_HEAD = [
    "export",
    "exact twin: largest difference (limit)",
    "KL, nats per position",
    "same first choice",
    "adapter's change kept: size",
    "cosine",
]
_GATE_NOTE = (
    "The exact twin is the same export with nothing rounded; it tells whether the export is right. The other figures "
    "are of the file itself: KL(trained || file), and how much of the adapter's change of the base's answers it makes, "
    "1 in cosine and 100% in size being all of it."
)


def _form(export: ExportFacts) -> str:
    return f"{export.format} {export.type}".rstrip()


def _fate(export: ExportFacts) -> str:
    verdict = {"unverified": "not verified"}.get(export.verdict, export.verdict)
    if not export.kept:
        return f"{verdict}; not written"
    return verdict + ("; written by --allow-drift" if verdict in {"drifted", "unproven"} else "")


def _with_limit(export: ExportFacts) -> str:
    if export.twin_difference is None or export.twin_limit is None:
        return "no number"
    return f"{export.twin_difference:.1g} ({export.twin_limit:.1g})"


def cost(record: RunRecord) -> list[Html]:
    """Time, speed, memory, machine."""
    spent = record.cost
    rows = [
        ["wall time, start to report", duration(spent.wall_seconds)],
        ["of it, training with its evaluations", duration(spent.train_seconds)],
        ["speed while training", f"{count(spent.tokens_per_second)} tokens per second (trained and context)"],
        [
            "tokens trained on",
            f"{count(spent.trained_tokens)} over {spent.epochs:g} epochs, {count(spent.steps)} steps",
        ],
        ["peak memory of the process", bytes_of(spent.peak_rss_bytes)],
        ["machine", spent.machine],
        ["precision", spent.precision],
    ]
    return [table("What the run took on this machine", ["", ""], rows)]


def data(record: RunRecord) -> list[Html]:
    """Source, shape, split, dropped and cut rows, findings."""
    facts = record.data
    allowed = f"{count(facts.max_tokens)} tokens" if facts.max_tokens else "no limit set"
    rows = [
        ["source", facts.source],
        ["rows", f"{count(facts.rows)}, detected as {facts.shape}"],
        ["training rows", count(facts.train_rows)],
        ["held-out rows", count(facts.heldout_rows)],
        ["how they were split", facts.split],
        [
            "tokens, one pass over the training rows",
            f"{count(facts.trained_tokens)} trained, {count(facts.all_tokens)} with context",
        ],
        [
            "longest row allowed",
            f"{allowed}; {count(facts.dropped_rows)} rows dropped, {count(facts.cut_rows)} cut",
        ],
        ["SHA-256", tag("code", facts.sha256)],
    ]
    parts = [table("What it was trained and measured on", ["", ""], rows)]
    if not facts.findings:
        return [*parts, tag("p", "The checks found nothing to report.")]
    found = [[item.code, item.severity, count(item.count), item.example] for item in facts.findings]
    head = ["finding", "severity", "rows", "first seen"]
    return [*parts, table("What the checks found in the data", head, found, numeric=(2,))]


def environment(record: RunRecord) -> list[Html]:
    """Everything needed to repeat the run."""
    base = record.base
    facts = [
        ["base", f"{base.name} from {base.source}"],
        ["base licence", base.license],
        ["base weights", "; ".join([base.dtype, *base.notes])],
        ["base fingerprint", tag("code", base.fingerprint)],
        *([["command", tag("code", record.command)]] if record.command else []),
        *([key, value] for key, value in record.environment.items()),
    ]
    recipe = [[item.key, tag("code", item.value), item.origin] for item in record.recipe]
    return [
        tag("p", "With these, the same data and the same versions, the run can be repeated."),
        folded("Environment", table("Base model, machine and versions", ["", ""], facts)),
        folded(
            f"Recipe, {len(recipe)} settings",
            table("Each setting, its value and where it came from", ["setting", "value", "origin"], recipe),
        ),
    ]


def limits(record: RunRecord) -> list[Html]:
    """What a reader must not conclude."""
    points = [
        "Held-out rows come from the same source as the training rows. How the model does on questions of another "
        "kind, or asked by other people, is not measured here.",
        "A lower nll means that the answers in the data became more likely. It does not say that an answer is true, "
        "polite or safe; read the answers above, and more of them.",
        f"The general prompts are {len(record.general.prompts)} short texts, most of them in English. They show how "
        "far the model moved, not whether a skill it had was lost; test the skills you rely on.",
        "Intervals treat rows as independent draws. Rows that are rephrasings of one another make them too narrow, and "
        "put nearly the same row on both sides of the split.",
        "This is one run with one seed. A second seed would give slightly different figures, and the intervals do not "
        "cover that.",
    ]
    if record.learning.heldout_change.units < 50:
        points.append(
            f"There are only {record.learning.heldout_change.units} held-out rows. Small improvements cannot be "
            "seen with so few."
        )
    return [tag("ul", *(tag("li", point) for point in points))]
