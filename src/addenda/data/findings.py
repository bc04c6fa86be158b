"""Findings: what is wrong with the data, where, and how to fix it; and the report that collects them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from addenda.errors import visible

__all__ = ["KEPT_PER_CODE", "Finding", "Report", "Severity", "json_path"]

Severity = Literal["error", "warning"]
KEPT_PER_CODE = 20
"""Findings of one code kept in full; the rest are only counted, so that a report stays small."""


def json_path(path: tuple[str | int, ...]) -> str:
    """Spell a path into a JSON value.

    Example:
        >>> json_path(("messages", 2, "role")), json_path(("odd key",)), json_path(())
        ('$.messages[2].role', "$['odd key']", '$')
    """
    out = "$"
    for step in path:
        if isinstance(step, int):
            out += f"[{step}]"
        else:
            out += f".{step}" if step.isidentifier() else f"[{step!r}]"
    return out


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in the data.

    Example:
        >>> print(Finding("missing_content", "error", "a.jsonl", 3, 14, "$.messages[0].content", "null", "write it"))
        a.jsonl:3:14: error missing_content at $.messages[0].content: null
            fix: write it
    """

    code: str
    severity: Severity
    file: str
    line: int
    """1-based; 0 where the finding is about the whole file."""
    column: int
    """1-based, in characters."""
    path: str
    """JSON path of the value, ``$`` for the row itself."""
    found: str
    fix: str
    row: int = -1
    """0-based index of the row; -1 for the whole file."""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        where = f" at {self.path}" if self.line else ""
        said = f"{place}: {self.severity} {self.code}{where}: {self.found}"
        return f"{_one_line(said)}\n    fix: {_one_line(self.fix)}"


@dataclass
class Report:
    """All findings of one data set: the first of each code in full, and how often each came.

    Example:
        >>> report = Report()
        >>> for line in range(1, 60):
        ...     report.add(Finding("missing_content", "error", "a.jsonl", line, 1, "$", "null", "write it"))
        >>> report.has_errors, report.counts, len(report.first(20))
        (True, {'missing_content': 59}, 20)
    """

    _kept: dict[tuple[Severity, str], list[Finding]] = field(default_factory=dict)
    _counts: Counter[tuple[Severity, str]] = field(default_factory=Counter)

    def wants(self, code: str, severity: Severity) -> bool:
        """Whether another finding like this would be kept in full (else it is enough to count it)."""
        return len(self._kept.get((severity, code), ())) < KEPT_PER_CODE

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it while few of its code and severity are kept."""
        self._counts[finding.severity, finding.code] += 1
        if self.wants(finding.code, finding.severity):
            self._kept.setdefault((finding.severity, finding.code), []).append(finding)

    def count(self, code: str, severity: Severity) -> None:
        """Count a finding without its text."""
        self._counts[severity, code] += 1

    def merge(self, other: Report) -> None:
        """Take over another report's findings and counts."""
        self._counts.update(other._counts)
        for kind, findings in other._kept.items():
            room = KEPT_PER_CODE - len(self._kept.get(kind, ()))
            self._kept.setdefault(kind, []).extend(findings[:room])

    @property
    def counts(self) -> dict[str, int]:
        """How often each code was found, most frequent first."""
        totals: Counter[str] = Counter()
        for (_, code), count in self._counts.items():
            totals[code] += count
        return dict(totals.most_common())

    @property
    def errors(self) -> int:
        """Number of findings that keep a run from starting."""
        return sum(count for (severity, _), count in self._counts.items() if severity == "error")

    @property
    def warnings(self) -> int:
        """Number of findings that do not."""
        return sum(count for (severity, _), count in self._counts.items() if severity == "warning")

    @property
    def has_errors(self) -> bool:
        """Whether the data may not be trained on as it is."""
        return self.errors > 0

    def __iter__(self) -> Iterator[Finding]:
        """The findings kept in full, in file order."""
        everything = [finding for findings in self._kept.values() for finding in findings]
        return iter(sorted(everything, key=lambda f: (f.file, f.line, f.column, f.code)))

    def __len__(self) -> int:
        return sum(self._counts.values())

    def first(self, limit: int = 20) -> list[Finding]:
        """Up to ``limit`` findings in file order: one of each code, then errors, then warnings."""
        leaders = [findings[0] for findings in self._kept.values()]
        others = [f for f in self if f not in leaders]
        ranked = sorted(leaders, key=_errors_first) + sorted(others, key=_errors_first)
        return sorted(ranked[:limit], key=lambda f: (f.file, f.line, f.column, f.code))

    def lines(self, limit: int = 20) -> list[str]:
        """Printable text: the first findings, then the counts where some were left out."""
        shown = self.first(limit)
        out = [str(finding) for finding in shown]
        if len(self) > len(shown):
            rest = ", ".join(f"{code} {count}" for code, count in self.counts.items())
            out.append(f"shown: {len(shown)} of {len(self)} findings; in all: {rest}")
        return out

    def to_json(self, limit: int = 20) -> dict[str, Any]:
        """The same as data: errors, warnings, counts per code, and the first findings."""
        return {
            "errors": self.errors,
            "warnings": self.warnings,
            "counts": self.counts,
            "findings": [asdict(finding) for finding in self.first(limit)],
        }


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "\\n")


def _errors_first(finding: Finding) -> bool:
    return finding.severity != "error"
