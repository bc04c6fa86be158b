"""Finding equal rows by their digests, in memory that is a few bytes a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["groups", "repeats", "shared"]


def repeats(digests: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Yield (row, first equal row before it) for every row that is a copy, in order of the rows.

    Example:
        >>> a, b = b"a" * 16, b"b" * 16
        >>> list(repeats(a + b + a + a))
        [(2, 0), (3, 0)]
    """
    import numpy as np

    first = groups(digests)
    for row in np.flatnonzero(first != np.arange(len(first))):
        yield int(row), int(first[row])


def groups(digests: bytes | bytearray) -> NDArray[np.int64]:
    """Return for each row the first row that equals it, as an int64 array of shape (rows,)."""
    import numpy as np

    halves = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal rows stay in order
    ordered = halves[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    leaders = order[starts]
    first = np.empty(len(order), dtype=np.int64)
    first[order] = leaders[np.cumsum(starts) - 1]
    return first


def shared(digests: bytes | bytearray, others: bytes | bytearray) -> list[int]:
    """Return the rows of ``others`` that are in ``digests`` too, ascending.

    Example:
        >>> shared(b"a" * 16 + b"b" * 16, b"c" * 16 + b"b" * 16)
        [1]
    """
    count = len(digests) // 16
    first = groups(bytes(digests) + bytes(others))
    return [row for row in range(len(others) // 16) if first[count + row] < count]
