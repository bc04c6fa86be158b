"""The report stays small, counts everything, and shows errors and rare codes first."""

from __future__ import annotations

import json

from addenda.data import Finding, Report


def finding(code: str, line: int, severity: str = "error") -> Finding:
    return Finding(code, severity, "a.jsonl", line, 1, "$", "found", "fix", line - 1)  # type: ignore[arg-type]


def test_twenty_are_shown_and_all_are_counted() -> None:
    report = Report()
    for line in range(1, 1001):
        report.add(finding("missing_content", line))
    report.add(finding("duplicate_row", 2000, "warning"))
    assert (report.errors, report.warnings, len(report)) == (1000, 1, 1001)
    lines = report.lines()
    assert len(lines) == 21
    assert lines[-1] == "shown: 20 of 1001 findings; in all: missing_content 1000, duplicate_row 1"
    assert lines[-2].startswith("a.jsonl:2000:1: warning duplicate_row at $: found")
    assert len(list(report)) == 21


def test_many_warnings_of_a_code_do_not_hide_its_error() -> None:
    report = Report()
    for line in range(1, 101):
        report.add(finding("message_unrecognized_key", line, "warning"))
    report.add(finding("message_unrecognized_key", 5000))
    assert any(line.startswith("a.jsonl:5000:1: error") for line in report.lines())


def test_a_clean_report_prints_nothing() -> None:
    report = Report()
    assert report.lines() == []
    assert not report.has_errors
    assert report.to_json() == {"errors": 0, "warnings": 0, "counts": {}, "findings": []}


def test_warnings_are_no_errors() -> None:
    report = Report()
    report.add(finding("few_rows", 1, "warning"))
    assert not report.has_errors
    assert json.loads(json.dumps(report.to_json()))["findings"][0]["severity"] == "warning"


def test_merging_adds_counts_and_keeps_few() -> None:
    one, two = Report(), Report()
    for line in range(1, 31):
        one.add(finding("invalid_json", line))
        two.add(finding("invalid_json", line + 100))
    two.add(finding("data_type", 500))
    one.merge(two)
    assert one.counts == {"invalid_json": 60, "data_type": 1}
    assert len(list(one)) == 21


def test_a_finding_about_the_whole_file_has_no_place() -> None:
    text = str(Finding("empty_file", "error", "a.jsonl", 0, 0, "$", "no rows", "write some"))
    assert text == "a.jsonl: error empty_file: no rows\n    fix: write some"


def test_a_finding_is_one_line_that_a_terminal_does_not_obey() -> None:
    hostile = "\x1b]0;title\x07\r\n\u202e"
    text = str(Finding("data_type", "error", f"a{hostile}", 1, 1, "$", f"found {hostile}", f"fix {hostile}"))
    assert text.count("\n") == 1
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
    assert "\\x1b]0;title\\x07\\r\\n\\u202e" in text
