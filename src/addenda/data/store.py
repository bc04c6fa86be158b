"""Encoded examples in a temporary file, so that their number is bounded by the disk, not by memory."""

from __future__ import annotations

import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

from addenda.data.rows import Example, RowRef

__all__ = ["ExampleStore"]


class ExampleStore(Sequence[Example]):
    """A growing list of examples; memory holds 28 bytes for each, the tokens lie in a file that goes with it.

    Example:
        >>> store = ExampleStore()
        >>> store.append(Example((5, 6), (False, True), RowRef("a.jsonl", 1, 0)))
        >>> store[0].input_ids, store[0].trained, list(store.lengths)
        ((5, 6), (False, True), [2])
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="addenda-examples-")  # noqa: SIM115 - it lives as long as the store
        weakref.finalize(self, self._file.close)
        self._starts, self._lines, self._rows = array("q"), array("I"), array("q")
        self._files = array("I")
        self._names: dict[str, int] = {}
        self.lengths = array("i")
        """Tokens of each example."""
        self.tokens = 0
        """Tokens of all examples."""

    def append(self, example: Example) -> None:
        """Put an example at the end."""
        self._files.append(self._names.setdefault(example.row.file, len(self._names)))
        # One 32-bit word a token: its id, and in the lowest bit whether it is trained on.
        words = array(
            "I", (token << 1 | on for token, on in zip(example.input_ids, example.trained, strict=True))
        )
        self._starts.append(self.tokens * 4)
        self._file.seek(self.tokens * 4)
        self._file.write(words.tobytes())
        self._lines.append(example.row.line)
        self._rows.append(example.row.index)
        self.lengths.append(len(example))
        self.tokens += len(example)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        self._file.seek(self._starts[index])
        words = array("I")
        words.frombytes(self._file.read(4 * self.lengths[index]))
        name = list(self._names)[self._files[index]]
        row = RowRef(name, self._lines[index], self._rows[index])
        return Example(tuple(word >> 1 for word in words), tuple(bool(word & 1) for word in words), row)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))
