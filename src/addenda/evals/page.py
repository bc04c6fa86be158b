"""Building blocks of a page: tags that escape all they are given, tables with captions, and numbers with units."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from addenda.intervals import Interval

__all__ = [
    "Html",
    "bytes_of",
    "count",
    "duration",
    "escape",
    "folded",
    "interval_text",
    "moment",
    "prose",
    "signed",
    "table",
    "tag",
]

MINUS = "\N{MINUS SIGN}"
NBSP = "\N{NO-BREAK SPACE}"
LONGEST_TEXT = 4000
"""Characters of one prompt or answer that a page shows; what is cut is counted."""
_KEPT_CONTROLS = "\n\t"
_UNSHOWABLE = {
    code: "\N{REPLACEMENT CHARACTER}"
    for code in (*range(32), *range(127, 160), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF)
    if chr(code) not in _KEPT_CONTROLS
}


class Html(str):
    """Text that is markup already; every other string is escaped where it enters a tag."""

    __slots__ = ()


def escape(text: str) -> Html:
    r"""Return text as markup that shows it literally; control characters and lone surrogates become visible marks.

    Example:
        >>> escape("<b>&'\x00")
        '&lt;b&gt;&amp;&#x27;�'
    """
    return text if isinstance(text, Html) else Html(html.escape(text.translate(_UNSHOWABLE), quote=True))


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """Return an element; children and attribute values are escaped unless they are `Html`.

    Attribute names lose a trailing underscore and turn the others into hyphens; None leaves the attribute out.

    Example:
        >>> tag("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("br", "meta", "link"):
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{''.join(escape(child) for child in children)}</{name}>")


def prose(text: str) -> Html:
    """Return a prompt or an answer as written, line breaks kept, cut after `LONGEST_TEXT` characters with a count."""
    if not text.strip():
        return tag("p", "(empty)", class_="prose muted")
    shown = text[:LONGEST_TEXT]
    cut = len(text) - len(shown)
    note = tag("span", f" … ({count(cut)} more characters)", class_="muted") if cut else Html("")
    return tag("p", shown, note, class_="prose", dir="auto")


def table(
    caption: str,
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numeric: Sequence[int] = (),
    class_: str | None = None,
) -> Html:
    """Return a table whose first column holds row headings.

    Args:
        caption: what the table shows, with its units.
        head: column titles; all empty for a table of facts, which then has no head.
        rows: cells, as text or markup.
        numeric: columns to set right.
        class_: for the style sheet.


    Example:
        >>> '<th scope="row">seed</th>' in table("Recipe", ["key", "value"], [["seed", "0"]])
        True
    """

    def cell(column: int, content: str) -> Html:
        align = "number" if column in numeric else None
        return tag("td", content, class_=align) if column else tag("th", content, scope="row")

    titles = [
        tag("th", title, scope="col", class_="number" if i in numeric else None)
        for i, title in enumerate(head)
    ]
    body = [tag("tr", *(cell(i, content) for i, content in enumerate(row))) for row in rows]
    header = [tag("thead", tag("tr", *titles))] if any(head) else []
    inner = tag("table", tag("caption", caption), *header, tag("tbody", *body), class_=class_)
    return tag("div", inner, class_="scroll", role="region", tabindex="0", aria_label=caption)


def folded(summary: str, *content: str) -> Html:
    """Return content that opens on a click or a key, and always when printed."""
    return tag("details", tag("summary", summary), *content)


def count(number: float) -> str:
    """Return a whole number with thin groups of three.

    Example:
        >>> count(1234567)
        '1,234,567'
    """
    return f"{number:,.0f}".replace("-", MINUS)


def signed(number: float, digits: int = 3) -> str:
    """Return a number with its sign, rounded; nothing is left of a sign on zero.

    Example:
        >>> signed(0.25, 2), signed(-0.0001, 2) == signed(0.0, 2)
        ('+0.25', True)
    """
    text = f"{abs(number):.{digits}f}"
    sign = "" if float(text) == 0 else MINUS if number < 0 else "+"
    return sign + text


def interval_text(interval: Interval, *, digits: int = 3, scale: float = 1.0, sign: bool = True) -> str:
    """Return the ends of an interval in words, or why there are none.

    Example:
        >>> interval_text(Interval(0.2, 0.1, 0.3, 40), digits=1, sign=False)
        '95% interval 0.1 to 0.3'
    """
    if interval.low is None or interval.high is None:
        return f"no interval: only {interval.units} units"
    ends = (interval.low * scale, interval.high * scale)
    low, high = (signed(end, digits) if sign else f"{end:.{digits}f}" for end in ends)
    return f"95% interval {low} to {high}"


def bytes_of(number: float) -> str:
    """Return a size in decimal units.

    Example:
        >>> bytes_of(19_500_000).replace(NBSP, " ")
        '19.5 MB'
    """
    size, unit = float(number), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f}{NBSP}{unit}" if unit == "bytes" else f"{size:.3g}{NBSP}{unit}"


def moment(iso: str) -> str:
    """Return an ISO 8601 time as people write it.

    Example:
        >>> moment("2026-11-23T14:05:09+00:00")
        '2026-11-23 14:05 UTC'
    """
    date, _, clock = iso.partition("T")
    zone = "UTC" if clock.endswith(("+00:00", "Z")) else clock[8:]
    return f"{date} {clock[:5]} {zone}".strip()


def duration(seconds: float) -> str:
    """Return a time span in its two largest units.

    Example:
        >>> duration(252).replace(NBSP, " "), duration(7530).replace(NBSP, " ")
        ('4 min 12 s', '2 h 5 min')
    """
    if seconds < 10:
        return f"{seconds:.1f}{NBSP}s"
    whole = math.floor(seconds + 0.5)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}{NBSP}h {minutes}{NBSP}min"
    return f"{minutes}{NBSP}min {whole % 60}{NBSP}s" if minutes else f"{whole}{NBSP}s"
