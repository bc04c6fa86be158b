"""The held-out split: which rows are trained on, and which only measured."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from addenda.data.dataset import Dataset, Rows
from addenda.data.duplicates import groups
from addenda.errors import ConfigError

__all__ = ["Split", "split"]

FRACTION = 0.1
MINIMUM = 20


@dataclass(frozen=True)
class Split:
    """The two sides, and how they were made. Unpacks as ``train, heldout``."""

    train: Rows
    heldout: Rows
    note: str
    """What was done, for the report: how many rows are held out, and why."""

    def __iter__(self) -> Iterator[Rows]:
        return iter((self.train, self.heldout))


def split(dataset: Dataset, *, fraction: float = FRACTION, minimum: int = MINIMUM, seed: int = 0) -> Split:
    """Hold rows out of training: the validation rows if there are any, else a share of all rows.

    A share is chosen by the hash of each row's content with the seed, so it does not depend on the order of the
    file, and equal rows are on the same side. At least ``minimum`` rows are held out, but never more than half.

    Args:
        dataset: what to divide.
        fraction: share of the rows to hold out, in (0, 0.5].
        minimum: rows to hold out at least, >= 0.
        seed: another seed, another choice.

    Raises:
        ConfigError: ``fraction`` or ``minimum`` is out of range.
    """
    if not 0 < fraction <= 0.5 or minimum < 0:
        raise ConfigError(
            f"a split needs a fraction in (0, 0.5] and a minimum of at least 0, got {fraction} and {minimum}",
            hint="the default holds out 0.1 of the rows, at least 20",
        )
    if dataset.valid is not None:
        note = f"{len(dataset.valid):,} rows of '{dataset.valid.name}' are held out"
        return Split(dataset.conversations, dataset.valid.conversations, note)
    count = len(dataset)
    wanted = min(max(minimum, round(count * fraction)), count // 2)
    held = _choose(dataset, wanted, seed)
    rest = sorted(set(range(count)) - held)
    note = _note(count, len(held), fraction=fraction, minimum=minimum)
    return Split(Rows(dataset, rest), Rows(dataset, sorted(held)), note)


def _choose(dataset: Dataset, wanted: int, seed: int) -> set[int]:
    """Take whole groups of equal rows in the order of their hashes until enough are held out."""
    if not wanted:
        return set()
    members: dict[int, list[int]] = {}
    for row, first in enumerate(groups(dataset.digests)):
        members.setdefault(int(first), []).append(row)
    key = seed.to_bytes(8, "little", signed=True)
    ranked = sorted(
        members, key=lambda first: hashlib.blake2b(dataset.digest(first), key=key, digest_size=8).digest()
    )
    held: set[int] = set()
    for first in ranked:
        if len(held) >= wanted:
            break
        if len(held) + len(members[first]) <= max(wanted, len(dataset) // 2):
            held.update(members[first])
    return held


def _note(count: int, held: int, *, fraction: float, minimum: int) -> str:
    if not held:
        return f"nothing is held out of {count} row{'' if count == 1 else 's'}: there is no held-out loss"
    note = f"{held:,} of {count:,} rows are held out ({held / count:.0%})"
    if held < min(minimum, count * fraction) or count // 2 < minimum:
        note += "; that is few, so the held-out loss is uncertain"
    elif round(count * fraction) < minimum:
        note += f", because at least {minimum} rows are"
    return note
