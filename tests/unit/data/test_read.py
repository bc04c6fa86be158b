"""Every container and every shape gives the same conversations; what cannot be read is said."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from addenda.core.progress import Progress
from addenda.data import Conversation, read_dataset
from addenda.errors import ConfigError, DataError, MissingDependencyError, NotFoundError

Write = Callable[..., Path]
TEXTS = [
    'plain, with "quotes"',
    "two\nlines",
    "café ☕",
    "tab\there",
    "semi;colon",
    " leading",
    "[1, 2]",
    "\\n",
]


def pairs(count: int = 24) -> list[dict[str, str]]:
    rng = random.Random(count)
    return [{"prompt": f"{n} {rng.choice(TEXTS)}", "completion": rng.choice(TEXTS)} for n in range(count)]


def as_table(rows: list[dict[str, str]], separator: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, object]], path: Path, group: int = 7) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def said(conversations: object) -> list[list[str]]:
    return [[message.content for message in conversation.messages] for conversation in conversations]


CONTAINERS = {
    "rows.jsonl": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "blank.jsonl": lambda rows: b"\n\n".join(json.dumps(row).encode() for row in rows),
    "compact.json": lambda rows: json.dumps(rows).encode(),
    "indented.json": lambda rows: json.dumps(rows, indent=4, ensure_ascii=False).encode(),
    "wrapped.json": lambda rows: json.dumps({"version": 2, "data": rows, "note": "x"}, indent=1).encode(),
    "mislabelled.txt": lambda rows: b"".join(json.dumps(row).encode() + b"\n" for row in rows),
    "rows.csv": lambda rows: as_table(rows, ","),
    "semicolons.csv": lambda rows: as_table(rows, ";"),
    "rows.tsv": lambda rows: as_table(rows, "\t"),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + as_table(rows, ","),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(name: str, write: Write) -> None:
    rows = pairs()
    dataset = read_dataset(write(CONTAINERS[name](rows), name)).require_clean()
    assert said(dataset.conversations) == [[row["prompt"], row["completion"]] for row in rows]
    assert dataset.shape == "prompt-completion"
    assert "24 rows" in dataset.detected


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    rows = pairs()
    dataset = read_dataset(as_parquet(rows, tmp_path / "rows.parquet")).require_clean()
    assert said(dataset.conversations) == [[row["prompt"], row["completion"]] for row in rows]
    assert dataset.detected == "parquet, prompt-completion, 24 rows"
    assert dataset.conversations[17].messages[0].content == rows[17]["prompt"]
    chats = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x"}]}
        for n in range(12)
    ]
    assert said(read_dataset(as_parquet(chats, tmp_path / "c.parquet")).conversations)[3] == ["3", "x"]


@pytest.mark.parametrize("name", [*CONTAINERS, "rows.parquet"])
def test_a_row_read_again_is_the_row_of_the_pass(name: str, write: Write, tmp_path: Path) -> None:
    rows = pairs()
    path = (
        as_parquet(rows, tmp_path / name) if name.endswith("parquet") else write(CONTAINERS[name](rows), name)
    )
    dataset = read_dataset(path)
    whole = list(dataset.conversations)
    for index in random.Random(1).sample(range(24), 8):
        assert dataset.conversations[index] == whole[index]
    with pytest.raises(IndexError, match="row 24 of 24"):
        dataset.conversations[24]


def test_lines_are_the_lines_of_the_file(write: Write) -> None:
    rows = pairs(12)
    body = json.dumps(rows, indent=2)
    dataset = read_dataset(write(body.encode(), "rows.json"))
    for conversation, row in zip(dataset.conversations, rows, strict=True):
        window = body.splitlines()[conversation.row.line - 1 : conversation.row.line + 2]
        assert json.dumps(row["prompt"]) in window[1]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64])
def test_an_array_is_found_in_pieces_of_any_size(
    chunk: int, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    from addenda.data import jsonarray

    rows = [{"text": text + '\\"}]', "n": [{"a": text}]} for text in TEXTS]
    path = write(json.dumps(rows, indent=chunk % 3 or None).encode(), "rows.json")
    whole = [
        (raw.data, raw.line, raw.column, raw.position) for raw in jsonarray.JsonArray(path, 0, 1 << 20).rows()
    ]
    monkeypatch.setattr(jsonarray.ByteStream.__init__, "__defaults__", (chunk,))
    pieces = [
        (raw.data, raw.line, raw.column, raw.position) for raw in jsonarray.JsonArray(path, 0, 1 << 20).rows()
    ]
    assert pieces == whole
    assert [json.loads(data) for data, *_ in pieces] == rows


ANSWERS = [["Hi.", "Hello."], ["Bye.", "See you."]]
SHAPES: dict[str, list[dict[str, object]]] = {
    "chat": [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in ANSWERS
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in ANSWERS
    ],
    "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in ANSWERS],
    "prompt-completion": [{"prompt": q, "completion": a} for q, a in ANSWERS],
    "vertex": [
        {"contents": [{"role": "user", "parts": [{"text": q}]}, {"role": "model", "parts": [{"text": a}]}]}
        for q, a in ANSWERS
    ],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_recognised_and_means_the_same(shape: str, write: Write) -> None:
    dataset = read_dataset(write(SHAPES[shape])).require_clean()
    assert dataset.shape == shape
    assert said(dataset.conversations) == ANSWERS
    roles = [[message.role for message in conversation.messages] for conversation in dataset.conversations]
    assert roles == [["user", "assistant"]] * 2
    reference = read_dataset(write(SHAPES["chat"], "chat.jsonl"))
    assert dataset.digests == reference.digests


def only(path: Path, **settings: object) -> Conversation:
    (conversation,) = read_dataset(path, **settings).require_clean().conversations
    return conversation


def test_alpaca_has_input_system_and_history(write: Write) -> None:
    row = {
        "instruction": "Sum",
        "input": "1 2",
        "output": "3",
        "system": "Be exact.",
        "history": [["Hi.", "Hello."]],
    }
    messages = only(write([row])).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be exact."),
        ("user", "Hi."),
        ("assistant", "Hello."),
        ("user", "Sum\n1 2"),
        ("assistant", "3"),
    ]
    assert all(message.trained for message in messages)


def test_sharegpt_has_a_system_field_tools_and_function_calls(write: Write) -> None:
    turns = [
        {"from": "human", "value": "Time?"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {"zone": "CET"}}'},
        {"from": "observation", "value": "noon"},
        {"from": "gpt", "value": "It is noon."},
    ]
    row = {"conversations": turns, "system": "Help.", "tools": '[{"name": "clock"}]'}
    conversation = only(write([row]))
    assert [message.role for message in conversation.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert conversation.messages[2].tool_calls[0]["function"] == {
        "name": "clock",
        "arguments": {"zone": "CET"},
    }
    assert conversation.tools == ({"name": "clock"},)


def test_chat_has_weights_names_parts_and_calls(write: Write) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "developer", "content": "Be kind."},
        {
            "role": "user",
            "name": "Ada",
            "content": [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you."}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": ""},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": "Yes.", "weight": 1, "reasoning_content": "hm"},
    ]
    turns = only(write([{"messages": messages, "tools": [{"type": "function"}]}])).messages
    assert [turn.role for turn in turns] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert (turns[1].content, turns[1].name) == ("Hi, you.", "Ada")
    assert turns[2].tool_calls[0]["function"]["arguments"] == {"x": 1}
    assert turns[3].tool_call_id == "c1"
    assert [turn.trained for turn in turns] == [True, True, True, True, False, True, True]
    assert turns[6].reasoning == "hm"


@pytest.mark.parametrize(
    "arguments",
    ['{"x": NaN}', '{"x": ' * 300 + "1" + "}" * 300, "{", "[1]", '{"x": "\\ud800"}', 3],
    ids=["NaN", "deep", "cut", "list", "surrogate", "number"],
)
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_arguments_that_are_no_object_are_named(arguments: object, form: str, write: Write) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    cell = {"messages": json.dumps(messages)}
    path = write(as_table([cell], ","), "t.csv") if form == "csv" else write([{"messages": messages}])
    (error,) = [finding for finding in read_dataset(path).report if finding.severity == "error"]
    assert (error.code, error.path) == ("invalid_tool_call", "$.messages[1].tool_calls")


def test_large_numbers_in_arguments_are_read(write: Write) -> None:
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": '{"x": 123456789012345678901234567890}'},
    }
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    assert (
        only(write([row])).messages[1].tool_calls[0]["function"]["arguments"]["x"]
        == 123456789012345678901234567890.0
    )


def test_a_deep_cell_of_a_table_is_not_read_as_a_list(write: Write) -> None:
    cell = '[{"role": "user", "content": "a", "x": ' + "[" * 900 + "]" * 900 + "}]"
    report = read_dataset(write(as_table([{"messages": cell}], ","), "t.csv")).report
    assert report.counts["missing_messages_list"] == 1


def test_answers_inside_a_prompt_are_context(write: Write) -> None:
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}
    assert [message.trained for message in only(write([row])).messages] == [True, False, True, True]


def test_columns_are_mapped_and_findings_name_the_files_own(write: Write) -> None:
    rows = [{"id": n, "question": f"q{n}", "long_answer": f"a{n}"} for n in range(12)]
    path = write([*rows, {"id": 12, "question": "q", "long_answer": 3}])
    bare = read_dataset(path)
    assert bare.report.counts == {"missing_messages_list": 13}
    assert next(iter(bare.report)).fix == "--set data.prompt=question --set data.completion=long_answer"
    dataset = read_dataset(path, columns={"prompt": "question", "completion": "long_answer"})
    assert said(dataset.conversations)[3] == ["q3", "a3"]
    error, unused = sorted(dataset.report, key=lambda finding: finding.code)
    assert (error.code, error.path, error.line) == ("missing_content", "$.long_answer", 13)
    assert (unused.code, unused.path, unused.found) == (
        "unused_column",
        "$.id",
        "column 'id' is not used (13 rows have it)",
    )
    absent = read_dataset(path, columns={"prompt": "question", "completion": "answer"})
    assert (
        next(iter(absent.report)).found
        == "no column 'answer'; columns found: 'id', 'question', 'long_answer'"
    )


def test_a_named_shape_settles_an_ambiguous_row(write: Write) -> None:
    rows = [{"instruction": "a", "input": "", "output": "b", "text": "a b"}]
    path = write(rows)
    finding = next(finding for finding in read_dataset(path).report if finding.code == "ambiguous_format")
    assert finding.fix == "say which counts: --set data.shape=alpaca or --set data.shape=text"
    assert only(path, shape="alpaca").messages[1].content == "b"
    assert only(path, shape="text").text == "a b"
    missing = read_dataset(path, shape="chat")
    assert next(iter(missing.report)).found == "no 'messages', which the shape 'chat' needs"


def test_a_folder_gives_its_three_files_and_names_shared_rows(write: Write) -> None:
    lines = CONTAINERS["rows.jsonl"](pairs(20)).splitlines(keepends=True)
    files = {"train.jsonl": b"".join(lines), "validation.jsonl": b"".join(lines[3:6]), "test.jsonl": lines[0]}
    dataset = read_dataset(write(files))
    assert dataset.valid is not None
    assert dataset.test is not None
    assert (len(dataset), len(dataset.valid), len(dataset.test)) == (20, 3, 1)
    overlap = next(finding for finding in dataset.valid.report if finding.code == "train_valid_overlap")
    assert overlap.found.startswith("3 of 3 rows are in '")


def test_an_error_in_the_validation_rows_stops_too(write: Write) -> None:
    good = CONTAINERS["rows.jsonl"](pairs(12))
    dataset = read_dataset(write({"train.jsonl": good, "valid.jsonl": b"{"}))
    assert not dataset.report.has_errors
    with pytest.raises(
        DataError, match=r"1 error; nothing was trained[\s\S]*valid\.jsonl:1[\s\S]*hint: correct these"
    ):
        dataset.require_clean()


def test_a_folder_without_a_clear_training_file_is_refused(write: Write, tmp_path: Path) -> None:
    folder = write({"a.jsonl": b"", "b.csv": b""})
    with pytest.raises(
        NotFoundError, match=r"holds no training file[\s\S]*data files: a.jsonl, b.csv[\s\S]*hint: name one"
    ):
        read_dataset(folder)
    (folder / "train.jsonl").touch()
    (folder / "train.csv").touch()
    with pytest.raises(DataError, match=r"several train files: train.csv, train.jsonl[\s\S]*hint: keep one"):
        read_dataset(folder)
    with pytest.raises(NotFoundError, match=r"there is no data file[\s\S]*hint: did you mean 'train.jsonl'"):
        read_dataset(folder / "trian.jsonl")


@pytest.mark.parametrize("form", ["rows.jsonl", "compact.json", "rows.csv"])
def test_standard_input_is_read_twice(form: str) -> None:
    rows = pairs()
    dataset = read_dataset("-", stdin=io.BytesIO(CONTAINERS[form](rows))).require_clean()
    assert said(dataset.conversations) == said(dataset.conversations) == [list(row.values()) for row in rows]
    assert dataset.conversations[0].row.file == "<stdin>"
    path = dataset.path
    del dataset
    assert not path.exists()


def test_a_changed_or_lost_file_is_noticed(write: Write) -> None:
    path = write(CONTAINERS["rows.jsonl"](pairs()))
    dataset = read_dataset(path)
    dataset.verify()
    path.write_bytes(path.read_bytes().replace(b"plain", b"plane"))
    with pytest.raises(DataError, match=r"changed while it was in use[\s\S]*hint: start again"):
        dataset.verify()
    path.write_bytes(b"\n".join(path.read_bytes().splitlines()[:10]))
    with pytest.raises(DataError, match="changed while it was in use"):
        list(dataset.conversations)
    path.unlink()
    with pytest.raises(DataError, match=r"is gone[\s\S]*hint: put the file back"):
        dataset.verify()


def test_progress_counts_bytes(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("addenda.data.dataset._PROGRESS_BYTES", 200)
    path = write(CONTAINERS["rows.jsonl"](pairs()))
    seen: list[Progress] = []
    read_dataset(path, on_progress=seen.append)
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert len(done) > 3
    assert seen[-1].fraction == 1.0


@pytest.mark.parametrize(
    ("content", "name", "code", "found"),
    [
        (b"prompt,completion\na,b,c\nd,e\n", "t.csv", "malformed_table", "3 fields, the header has 2"),
        (b"prompt,prompt\na,b\n", "t.csv", "malformed_table", "names column 'prompt' twice"),
        (b'prompt,completion\na,"b\nc,d\n', "t.csv", "malformed_table", "unexpected end of data"),
        (b"prompt,completion\na,b\xe9\nd,e\n", "t.csv", "invalid_utf8", "byte 0xe9"),
        (b"prompt,completion\na,b\x00\nd,e\n", "t.csv", "nul_character", "a zero byte"),
        (b"prompt,completion\n", "t.csv", "empty_file", "no rows"),
        (b"PAR1 nonsense", "t.parquet", "unreadable_file", "parquet: "),
        (b"\x1f\x8b\x08junk", "t.jsonl", "unreadable_file", "compressed (gzip)"),
        (b"some words\n", "t.doc", "unreadable_file", "begins 'some words'"),
        (b'[{"text": "a"},]', "t.json", "invalid_json", "a comma after the last row"),
        (b'[{"text": "a"} {"text": "b"}]', "t.json", "invalid_json", "'{' after a row"),
        (b'[{"text": "a"}]\n[]', "t.json", "data_type", "a list where a row belongs"),
        (b'[\n{"text": "a"}\n]\nx', "t.json", "invalid_json", "more text after the end"),
        (b'{"text": "a",\n"b": [1]', "t.jsonl", "invalid_json", ""),
        (b"[]", "t.json", "empty_file", "no rows"),
        (b'{"text": ["a"]}', "t.jsonl", "missing_content", "a list where text belongs"),
        (b'{"messages": "hi"}', "t.jsonl", "missing_messages_list", "the string 'hi' where a list"),
        (b'{"messages": [], "tools": 3}', "t.jsonl", "missing_messages_list", "an empty list"),
        (b'{"prompt": "a", "completion": "b", "label": true}', "t.jsonl", "preference_row", "(label)"),
    ],
)
def test_what_cannot_be_read_is_named(content: bytes, name: str, code: str, found: str, write: Write) -> None:
    report = read_dataset(write(content, name)).report
    assert any(finding.code == code and found in finding.found for finding in report), report.lines()
    assert report.has_errors


def test_a_quote_never_closed_costs_one_row_not_the_file(write: Write) -> None:
    body = b"prompt,completion\n" + b'1,"open\n' + b"2,shut\n" * 40_000
    dataset = read_dataset(write(body, "t.csv"), row_limit=10_000)
    (error,) = [finding for finding in dataset.report if finding.severity == "error"]
    assert (error.code, error.line) == ("row_too_long", 2)
    assert error.fix.endswith("is a quote opened here and never closed?")
    assert len(dataset) == 40_000


def test_parquet_without_pyarrow_names_the_extra(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs 'pyarrow'[\s\S]*hint: pip install 'addenda\[parquet\]'"
    ):
        read_dataset(write(b"PAR1", "t.parquet"))


def test_wrong_settings_are_named(write: Write) -> None:
    path = write(pairs(12))
    with pytest.raises(
        ConfigError, match=r"there is no data shape 'alpacca'[\s\S]*hint: did you mean 'alpaca'"
    ):
        read_dataset(path, shape="alpacca")
    with pytest.raises(
        ConfigError, match=r"no shape has a key 'question'[\s\S]*hint: for instance --set data\.prompt"
    ):
        read_dataset(path, columns={"question": "prompt"})
    with pytest.raises(ConfigError, match=r"row_limit must be at least 1[\s\S]*hint: the default"):
        read_dataset(path, row_limit=0)


@pytest.mark.parametrize(
    ("content", "code", "place"),
    [
        (b'completion,prompt\n"a, ""b""\nc",\n', "missing_content", (3, 4)),
        (b'prompt,completion\n"a\nb",c\n\xc3\xa9, \n', "missing_content", (4, 3)),
        (b'prompt,completion\n"a\nb",c\n"d\nxy\xe9",f\n', "invalid_utf8", (5, 3)),
        (b'prompt,completion\na,b\n\xc3\xa9,"f\n\x00"\n', "nul_character", (4, 1)),
        (b'prompt,messages\na,"[{""role"": ""bot"", ""content"": ""x""}]"\n', "unrecognized_role", (2, 3)),
        (b"id,prompt,completion\n1,b,c\n", "unused_column", (2, 1)),
    ],
)
def test_a_finding_in_a_table_names_the_place_in_the_file(
    content: bytes, code: str, place: tuple[int, int], write: Write
) -> None:
    report = read_dataset(write(content, "t.csv")).report
    assert [(f.line, f.column) for f in report if f.code == code] == [place], report.lines()


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (b'{"prompt": "a", "completion": "b"}\n' * 10, "rows.csv", "jsonl"),
        (b'[{"prompt": "a", "completion": "b"}]', "rows.tsv", "json array"),
        (b"prompt,completion\n" + b"a,b\n" * 10, "rows.jsonl", "csv"),
        (b"prompt\tcompletion\n" + b"a\tb\n" * 10, "rows.txt", "tsv"),
        (b'"[1]",prompt,completion\nx,a,b\n', "rows.csv", "csv"),
    ],
)
def test_the_content_says_what_a_file_is_whatever_its_name(
    content: bytes, name: str, kind: str, write: Write
) -> None:
    dataset = read_dataset(write(content, name))
    assert dataset.detected.startswith(f"{kind}, prompt-completion, ")
    assert not dataset.report.has_errors


def test_a_data_set_is_shown_in_a_few_words(write: Write) -> None:
    dataset = read_dataset(write(CONTAINERS["rows.jsonl"](pairs())))
    assert len(repr(dataset)) < 500
    assert len(repr(dataset.conversations)) < 600
    assert "data.jsonl" in repr(dataset)


def test_test_rows_that_are_trained_on_are_named(write: Write) -> None:
    rows = CONTAINERS["rows.jsonl"](pairs())
    dataset = read_dataset(write({"train.jsonl": rows, "test.jsonl": rows}))
    assert dataset.test is not None
    assert "train_valid_overlap" in dataset.test.report.counts
