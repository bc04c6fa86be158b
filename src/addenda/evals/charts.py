"""Charts as inline SVG, drawn without a library: they follow the page's colours and need no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from addenda.evals.page import MINUS, Html, signed, tag
from addenda.intervals import Interval

__all__ = ["Series", "bar", "line_chart", "ticks", "whisker_chart"]

WIDTH, HEIGHT = 760.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 20.0, 38.0, 52.0
MOST_POINTS = 200


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    label: str
    style: str
    """A class of the page's style sheet: ``train`` or ``heldout``."""
    points: tuple[tuple[float, float], ...]
    """(x, y), by rising x."""

    @property
    def per_point(self) -> int:
        """How many measurements one drawn point is the mean of."""
        return max(1, math.ceil(len(self.points) / MOST_POINTS))

    def thinned(self) -> list[tuple[float, float]]:
        """Return at most `MOST_POINTS` points, each the mean of `per_point` neighbours."""
        groups = [self.points[i : i + self.per_point] for i in range(0, len(self.points), self.per_point)]
        return [
            (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups
        ]


def ticks(low: float, high: float, count: int = 5, *, least_step: float = 0.0) -> list[float]:
    """Return about `count` round numbers that span [low, high], at least `least_step` apart.

    Example:
        >>> ticks(0.13, 0.88, 4)
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low or abs(high) or 1.0
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    step = max(step, least_step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, mark: tuple[float, str] | None = None
) -> Html:
    """Return a line chart with labelled axes and a legend.

    Args:
        series: at least one point between them.
        title: read out by screen readers in place of the drawing.
        x_label: what x is, with its unit.
        y_label: what y is, with its unit.
        mark: an x to mark with a vertical line, and its label.
    """
    drawn = [(line, line.thinned()) for line in series if line.points]
    every = [point for _, points in drawn for point in points]
    x_ticks = ticks(min(0.0, *(x for x, _ in every)), max(x for x, _ in every), 6, least_step=1)
    y_ticks = ticks(min(y for _, y in every), max(y for _, y in every), 5)
    plot = _Plot(x_ticks, y_ticks)
    parts = [*plot.axes(x_label, y_label), *([plot.mark(*mark)] if mark else [])]
    parts += [part for line, points in drawn for part in plot.line(line, points)]
    parts += _legend([line for line, _ in drawn])
    return _svg(WIDTH, HEIGHT, title, parts)


@dataclass(frozen=True)
class _Plot:
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def axes(self, x_label: str, y_label: str) -> list[Html]:
        floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        parts = []
        for value in self.y_ticks:
            parts.append(_line(LEFT, self.y(value), right, self.y(value), "grid"))
            parts.append(_text(LEFT - 10, self.y(value) + 4, _plain(value), anchor="end"))
        for value in self.x_ticks:
            parts.append(_line(self.x(value), floor, self.x(value), floor + 5, "axis"))
            parts.append(_text(self.x(value), floor + 20, _plain(value)))
        parts.append(_line(LEFT, floor, right, floor, "axis"))
        parts.append(_text((LEFT + right) / 2, HEIGHT - 10, x_label, style="label"))
        middle = (TOP + floor) / 2
        parts.append(_text(16, middle, y_label, style="label", transform=f"rotate(-90 16 {middle})"))
        return parts

    def mark(self, value: float, label: str) -> Html:
        at = self.x(value)
        left_half = at < (LEFT + WIDTH - RIGHT) / 2
        label_at, anchor = (at + 6, "start") if left_half else (at - 6, "end")
        line = _line(at, TOP, at, HEIGHT - BOTTOM, "mark")
        return tag("g", line, _text(label_at, TOP + 12, label, anchor=anchor, style="label"))

    def line(self, series: Series, points: Sequence[tuple[float, float]]) -> list[Html]:
        path = " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)
        parts = [tag("polyline", points=path, class_=f"line {series.style}")]
        if len(points) <= 60:
            parts += [_marker(series.style, self.x(x), self.y(y)) for x, y in points]
        return parts


def whisker_chart(rows: Sequence[tuple[str, Interval, str]], *, title: str, x_label: str) -> Html:
    """Return estimates with their intervals beside a zero line; each row is (label, interval, style)."""
    left, right, step, top = 250.0, 96.0, 44.0, 14.0
    floor = top + step * len(rows)
    ends = [end for _, known, _ in rows for end in (known.value, known.low, known.high) if end is not None]
    marks = ticks(min(0.0, *ends), max(0.0, *ends), 5)

    def x(value: float) -> float:
        return round(left + (value - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - left - right), 1)

    parts = [_line(x(value), top, x(value), floor, "zero" if value == 0 else "grid") for value in marks]
    parts += [_text(x(value), floor + 18, _plain(value)) for value in marks]
    parts.append(_text((left + WIDTH - right) / 2, floor + 40, x_label, style="label"))
    for index, (label, known, style) in enumerate(rows):
        y = top + step * (index + 0.5)
        parts.append(_text(left - 14, y + 4, label, anchor="end", style="label"))
        if known.low is not None and known.high is not None:
            parts.append(_line(x(known.low), y, x(known.high), y, f"whisker {style}"))
        parts.append(_marker(style, x(known.value), y, size=6))
        parts.append(_text(WIDTH - right + 14, y + 4, signed(known.value), anchor="start", style="value"))
    return _svg(WIDTH, floor + 50, title, parts)


def bar(share: float) -> Html:
    """Return a small bar for a table cell; `share` of its full width, in [0, 1]. The number stands beside it."""
    full = tag("rect", width=100, height=10, rx=2, class_="track")
    filled = tag("rect", width=round(100 * min(1.0, max(0.0, share)), 1), height=10, rx=2, class_="fill")
    return tag(
        "svg",
        full,
        filled,
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        class_="bar",
        aria_hidden="true",
    )


def _legend(series: Sequence[Series]) -> list[Html]:
    parts, at = [], LEFT
    for line in series:
        label = line.label + (f" (mean of {line.per_point} steps)" if line.per_point > 1 else "")
        parts.append(_line(at, 16, at + 28, 16, f"line {line.style}"))
        parts.append(_marker(line.style, at + 14, 16))
        parts.append(_text(at + 36, 20, label, anchor="start", style="label"))
        at += 36 + 7.4 * len(label) + 26
    return parts


def _svg(width: float, height: float, title: str, parts: Sequence[Html]) -> Html:
    return tag(
        "svg", tag("title", title), *parts, viewBox=f"0 0 {width:g} {height:g}", role="img", class_="chart"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=style)


def _text(
    x: float,
    y: float,
    content: str,
    *,
    anchor: str = "middle",
    style: str = "tick",
    transform: str | None = None,
) -> Html:
    return tag("text", content, x=x, y=y, text_anchor=anchor, class_=style, transform=transform)


def _marker(style: str, x: float, y: float, *, size: float = 4) -> Html:
    """A square for training, a circle for all else: the lines differ by shape as well as by colour."""
    if style == "train":
        return tag(
            "rect",
            x=x - size + 0.5,
            y=y - size + 0.5,
            width=2 * size - 1,
            height=2 * size - 1,
            class_=f"dot {style}",
        )
    return tag("circle", cx=x, cy=y, r=size, class_=f"dot {style}")


def _plain(value: float) -> str:
    return f"{value:g}".replace("-", MINUS)
