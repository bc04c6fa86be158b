"""The report: one page that needs nothing but itself, written from a run's record."""

from __future__ import annotations

import math
import os
from importlib import resources
from pathlib import Path

from addenda.evals.charts import whisker_chart
from addenda.evals.page import Html, bytes_of, count, duration, interval_text, moment, signed, table, tag
from addenda.evals.record import RunRecord
from addenda.evals.sections import (
    answers,
    cost,
    curves,
    data,
    environment,
    exported,
    general,
    limits,
    over_seeds,
    trained,
)
from addenda.intervals import Interval

__all__ = ["render_report", "write_report"]

ARROW = "\N{RIGHTWARDS ARROW}"
_HEADINGS = {
    "learned": "Learned",
    "memorising": "Memorising",
    "nothing learned": "Nothing learned",
    "cannot tell": "Cannot tell",
}
_NLL = (
    "The nll (negative log-likelihood) says how surprised a model is by the answer in the data: a token it gives the "
    "probability p costs -ln p nats. Lower is better; 0.69 nats less is a right token made twice as likely."
)
_RULE = (
    "The rule: learned, if held-out rows became easier beyond chance and kept at least half of what the training rows "
    "gained; memorising, if the training rows became easier and held-out rows did not, or kept less than half of it; "
    "nothing learned, if neither did. Beyond chance means that the whole 95% interval is on one side of zero."
)


def write_report(path: str | os.PathLike[str], record: RunRecord) -> Path:
    """Write the report of a run as one HTML page without scripts or outside requests; return its path.

    The page is written beside its place and moved there, so a reader never sees half of it.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(render_report(record), encoding="utf-8", newline="\n")
    partial.replace(target)
    return target


def render_report(record: RunRecord) -> str:
    """Return the page as text."""
    parts = [
        ("learning", "Learned or memorised", _learning(record)),
        *([("seeds", "Over the seeds", over_seeds(record.seeds))] if record.seeds else []),
        ("curves", "The loss while training", curves(record)),
        ("answers", "Answers before and after", answers(record)),
        ("general", "How far the model moved on general prompts", general(record)),
        ("trained", "What was trained", trained(record)),
        *([("exports", "What was exported", exported(record.exports))] if record.exports else []),
        ("cost", "What it cost", cost(record)),
        ("data", "The data", data(record)),
        ("environment", "Recipe and environment", environment(record)),
        ("limits", "What this report does not show", limits(record)),
    ]
    links = [tag("li", tag("a", title, href=f"#{key}")) for key, title, _ in parts]
    sections = [tag("section", tag("h2", title), *body, id=key) for key, title, body in parts]
    body = tag(
        "body",
        tag("a", "Skip to the figures", href="#main", class_="skip"),
        _header(record),
        tag("nav", tag("ul", *links), aria_label="Sections"),
        tag("main", *sections, id="main"),
        tag(
            "footer",
            f"Written by Addenda {record.version}, {moment(record.finished)}. This page holds all it shows.",
        ),
    )
    return f"<!doctype html>\n{tag('html', _head(record), body, lang='en')}\n"


def _head(record: RunRecord) -> Html:
    style = resources.files("addenda.evals").joinpath("report.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; style-src 'unsafe-inline'; img-src data:",
        ),
        tag("meta", name="generator", content=f"Addenda {record.version}"),
        tag("link", rel="icon", href="data:,"),
        tag("title", f"{record.name}: {_HEADINGS[record.learning.verdict].lower()} (Addenda report)"),
        tag("style", Html(style)),
    )


def _header(record: RunRecord) -> Html:
    verdict = record.learning.verdict
    style = verdict if verdict in ("learned", "memorising") else "unsure"
    facts = f"{record.base.name} adapted with {record.method.name} on {record.data.source}, {moment(record.finished)}"
    return tag(
        "header",
        tag("p", "Addenda run report", class_="eyebrow"),
        tag("h1", record.name),
        tag("p", facts, class_="muted"),
        tag(
            "div",
            tag("p", tag("strong", _HEADINGS[verdict]), record.learning.sentence),
            class_=f"verdict {style}",
        ),
        tag("dl", *_figures(record), class_="figures"),
    )


def _figures(record: RunRecord) -> list[Html]:
    held, kl, method, cost_ = record.heldout, record.general, record.method, record.cost
    share = method.trainable_parameters / method.total_parameters
    return [
        _figure(
            "Held-out nll, nats per token (lower is better)",
            _change(f"{held.nll_before:.2f}", f"{held.nll_after:.2f}"),
            f"change {signed(held.nll_change.value)}, {interval_text(held.nll_change)}",
        ),
        _figure(
            "Held-out tokens predicted right",
            _change(f"{held.accuracy_before:.1%}", f"{held.accuracy_after:.1%}"),
            f"change {signed(100 * held.accuracy_change.value, 1)} points, "
            + interval_text(held.accuracy_change, digits=1, scale=100),
        ),
        _figure(
            "Moved from the base on general prompts",
            f"{kl.mean:.3f}",
            f"mean KL in nats per token, {interval_text(kl.interval, sign=False)}",
        ),
        _figure(
            "Trained parameters",
            f"{share:.2%}",
            f"{count(method.trainable_parameters)} of {count(method.total_parameters)}; "
            f"the adapter takes {bytes_of(method.adapter_bytes)}",
        ),
        _figure(
            "Time",
            duration(cost_.wall_seconds),
            f"{count(cost_.tokens_per_second)} tokens per second while training",
        ),
        _figure("Peak memory", bytes_of(cost_.peak_rss_bytes), cost_.machine),
    ]


def _figure(name: str, value: str, note: str) -> Html:
    return tag(
        "div",
        tag("dt", name),
        tag("dd", value, class_="big"),
        tag("dd", note, class_="note"),
        class_="figure",
    )


def _change(before: str, after: str) -> Html:
    return Html(tag("span", f"{before} {ARROW} ", class_="from") + tag("span", after))


def _learning(record: RunRecord) -> list[Html]:
    learning, held = record.learning, record.heldout
    rows = [
        ("Training rows, change", learning.train_change, "train"),
        ("Held-out rows, change", learning.heldout_change, "heldout"),
        ("Gap: held-out minus training", learning.gap, "gap"),
    ]
    chart = whisker_chart(
        rows,
        title="Change in nll per token on training and held-out rows and the gap between them, with 95% intervals",
        x_label="nats per trained token; left of zero is better than the base",
    )
    return [
        tag(
            "p",
            f"The base and the adapted model predict the same {count(held.rows)} held-out rows "
            f"({count(held.tokens)} trained tokens), which training never saw, and "
            f"{learning.train_change.units} rows it did see. A model that learned gains on both; "
            "one that memorised gains only on the rows it saw.",
        ),
        tag("div", chart, class_="scroll", role="region", tabindex="0", aria_label="Chart of changes"),
        table(
            "The same in numbers, in nats per trained token unless said otherwise",
            ["measure", "estimate", "95% interval", "rows"],
            _learning_rows(record),
            numeric=(1, 2, 3),
        ),
        tag("p", _NLL, class_="note"),
        tag("p", _RULE, class_="note"),
    ]


def _learning_rows(record: RunRecord) -> list[list[str]]:
    learning, held = record.learning, record.heldout
    perplexity = f"{math.exp(held.nll_before):.2f} {ARROW} {math.exp(held.nll_after):.2f}"
    return [
        ["held-out rows, base", f"{held.nll_before:.3f}", "", count(held.rows)],
        ["held-out rows, adapted", f"{held.nll_after:.3f}", "", count(held.rows)],
        ["the same as perplexity, base and adapted", perplexity, "", count(held.rows)],
        _row("held-out rows, change", learning.heldout_change),
        _row("training rows, change", learning.train_change),
        _row("gap after training (held-out minus training rows)", learning.gap),
        _row("of the gap, made by training", learning.gap_growth),
        _share_row("answers reproduced word for word, held-out rows (share)", learning.verbatim_heldout),
        _share_row("answers reproduced word for word, training rows (share)", learning.verbatim_train),
    ]


def _row(name: str, known: Interval) -> list[str]:
    ends = interval_text(known).removeprefix("95% interval ")
    return [name, signed(known.value), ends, count(known.units)]


def _share_row(name: str, known: Interval) -> list[str]:
    ends = interval_text(known, digits=1, scale=100, sign=False).removeprefix("95% interval ")
    return [name, f"{known.value:.1%}", f"{ends}%" if known.low is not None else ends, count(known.units)]
