"""The report is one well-formed, self-contained, escaped and readable page."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from addenda.evals.overfitting import Learning
from addenda.evals.record import RunRecord
from addenda.evals.report import render_report, write_report
from addenda.intervals import Interval

MakeRecord = Callable[..., RunRecord]
HOSTILE = "</style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x00\u202e"
VOID = {"br", "meta", "link"}


class Page(HTMLParser):
    """Collects elements and fails on a tag that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for element, attributes in self.elements if element == name]


def poisoned(value: Any) -> Any:
    """The same record with every text in it replaced by a hostile one; verdicts keep to their few words."""
    if dataclasses.is_dataclass(value):
        kept = {"verdict"} if isinstance(value, Learning) else set()
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(**{k: v if k in kept else poisoned(v) for k, v in fields.items()})
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, dict):
        return {HOSTILE + key: poisoned(item) for key, item in value.items()}
    return tuple(poisoned(item) for item in value) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def page(made_up_record: MakeRecord) -> Page:
    return Page(render_report(made_up_record()))


def test_page_shows_the_figures_with_units_and_intervals(page: Page) -> None:
    for words in (
        "Learned",
        "2.41",
        "1.08",
        "95% interval \N{MINUS SIGN}1.451 to \N{MINUS SIGN}1.207",
        "+23.5 points",
        "nats per token",
        "1,935,360 of 136,450,368",
        "3\N{NO-BREAK SPACE}min 51\N{NO-BREAK SPACE}s",
        "1.18\N{NO-BREAK SPACE}GB",
        "794 tokens per second",
        "model.layers.29.down_proj",
        "Shipping to Norway is 12 euros, and it's free once your order reaches 90 euros.",
        "default of lora",
        "same as line 4",
        "2026-11-23 14:05 UTC",
        "Training ended because all steps were done.",
        "gguf q4_0",
        "drifted; not written",
        "drifted; written by --allow-drift",
        "not verified",
        "llama.cpp (xllamacpp 2026.10)",
        "2026-11-24 09:12 UTC, Addenda 0.1.0",
        "0.0003 (0.001)",
        "0.0037 (0.0029 to 0.0048)",
        "6.1% (4.5% to 9.0%)",
        "What this report does not show",
    ):
        assert words in page.text


def test_page_asks_for_nothing_outside_itself(page: Page) -> None:
    for name, attributes in page.elements:
        assert name not in {"script", "img", "iframe", "object", "embed", "base", "form"}
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in {"src", "href", "xlink:href", "action", "data"}:
                assert value.startswith("#") or value == "data:,"
    style = resources.files("addenda.evals").joinpath("report.css").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style
    policy = next(
        m["content"] for m in page.named("meta") if m.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")


def test_hostile_text_anywhere_in_the_record_stays_text(made_up_record: MakeRecord) -> None:
    clean, dirty = Page(render_report(made_up_record())), Page(render_report(poisoned(made_up_record())))
    assert [name for name, _ in dirty.elements if name in {"script", "img", "style"}] == ["style"]
    assert {name for name, _ in dirty.elements} == {name for name, _ in clean.elements}
    assert not any(key.startswith("on") for _, attributes in dirty.elements for key in attributes)
    assert "<script>alert(1)</script>" in dirty.text


def test_every_table_has_a_caption_and_every_chart_a_title(page: Page) -> None:
    names = [name for name, _ in page.elements]
    for index, name in enumerate(names):
        if name == "table":
            assert names[index + 1] == "caption"
    charts = [i for i, (name, a) in enumerate(page.elements) if name == "svg" and a.get("role") == "img"]
    assert len(charts) == 2
    assert all(names[index + 1] == "title" for index in charts)


def test_headings_descend_one_level_at_a_time_from_a_single_first(page: Page) -> None:
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_links_within_the_page_lead_somewhere(page: Page) -> None:
    places = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {link["href"][1:] for link in page.named("a")} <= places
    assert page.named("html")[0]["lang"] == "en"


@pytest.mark.parametrize("verdict", ["learned", "memorising", "nothing learned", "cannot tell"])
def test_each_verdict_has_its_heading_and_sentence(verdict: Any, made_up_record: MakeRecord) -> None:
    learning = dataclasses.replace(made_up_record().learning, verdict=verdict, sentence="What happened.")
    text = Page(render_report(made_up_record(learning=learning))).text
    assert verdict.capitalize() in text
    assert "What happened." in text


def test_sparse_run_still_gives_a_whole_page(made_up_record: MakeRecord) -> None:
    record = made_up_record()
    unknown = Interval(0.1, None, None, 3)
    sparse = dataclasses.replace(
        record,
        samples=(),
        recipe=(),
        environment={},
        command="",
        curves=dataclasses.replace(record.curves, train=(), heldout=(), kept_step=None),
        learning=dataclasses.replace(
            record.learning,
            verdict="cannot tell",
            heldout_change=unknown,
            train_change=unknown,
            gap=unknown,
            gap_growth=unknown,
        ),
        general=dataclasses.replace(record.general, mean=0.0, low=0.0, high=0.0, skipped=5),
        data=dataclasses.replace(record.data, findings=(), max_tokens=0),
    )
    text = Page(render_report(sparse)).text
    for words in (
        "no interval: only 3 units",
        "No question was asked",
        "No loss was recorded",
        "found nothing to report",
    ):
        assert words in text


def test_record_survives_json(made_up_record: MakeRecord) -> None:
    record = made_up_record()
    again = RunRecord.from_json(record.to_json())
    assert again == record
    assert render_report(again) == render_report(record)


def test_report_is_written_whole_and_replaces_an_older_one(
    tmp_path: Path, made_up_record: MakeRecord
) -> None:
    target = tmp_path / "new" / "report.html"
    write_report(target, made_up_record(name="first"))
    assert write_report(target, made_up_record(name="second")) == target
    assert "<h1>second</h1>" in target.read_text(encoding="utf-8")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_colours_contrast_enough_in_both_schemes() -> None:
    style = resources.files("addenda.evals").joinpath("report.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in style.split(":root {")[1:3]
    )
    for colours in (light, dark):
        pairs = [
            (ink, ground) for ink in ("ink", "muted", "accent", "warm") for ground in ("paper", "surface")
        ]
        pairs += [(word, f"{word}-soft") for word in ("good", "bad", "unsure")]
        pairs += [("ink", f"{word}-soft") for word in ("good", "bad", "unsure")]
        for ink, ground in pairs:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio of two sRGB colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
