"""What a room offers is what its ``__all__`` says."""

from __future__ import annotations

import importlib
import inspect
import types
from pathlib import Path

import pytest

import addenda

PACKAGE = Path(addenda.__file__).parent
ROOMS = ["addenda", *sorted(f"addenda.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py"))]
MODULES = sorted(
    ".".join(("addenda", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


def offered(module: types.ModuleType) -> set[str]:
    """The public names that a room shows: what ``dir`` lists, without its own submodules and the future import."""
    names = {name for name in dir(module) if not name.startswith("_")} - {"annotations"}
    return {name for name in names if not isinstance(getattr(module, name), types.ModuleType)}


def is_class(value: object) -> bool:
    """Whether a value is a class; ``Callable[[int], None]`` passes for one in some versions of Python."""
    return isinstance(value, type) and not isinstance(value, types.GenericAlias)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_offers_exactly_what_it_lists(room: str) -> None:
    module = importlib.import_module(room)
    listed = set(getattr(module, "__all__", ())) - {"__version__"}
    assert {n for n in listed if isinstance(getattr(module, n), types.ModuleType)} | offered(module) == listed


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_of_a_room_hides_a_name_that_the_room_offers(room: str) -> None:
    """Importing a file sets its name on the room: a lazily offered name would then be the file."""
    module = importlib.import_module(room)
    offers = {n: getattr(module, n) for n in getattr(module, "__all__", ())}
    things = {name for name, value in offers.items() if not isinstance(value, types.ModuleType)}
    files = {name.rpartition(".")[2] for name in MODULES if name.rpartition(".")[0] == room}
    lazy = hasattr(module, "__getattr__")
    assert not (things & files if lazy else set())


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_every_name_it_lists(name: str) -> None:
    module = importlib.import_module(name)
    listed = list(getattr(module, "__all__", ()))
    assert not [entry for entry in listed if not hasattr(module, entry)]
    assert len(listed) == len(set(listed))


@pytest.mark.parametrize("room", ROOMS)
def test_everything_a_room_offers_is_documented(room: str) -> None:
    module = importlib.import_module(room)
    assert module.__doc__, f"{room} says nothing about itself"
    offers = {entry: getattr(module, entry) for entry in getattr(module, "__all__", ())}
    code = {entry: value for entry, value in offers.items() if is_class(value) or inspect.isfunction(value)}
    assert not [entry for entry, value in code.items() if not inspect.getdoc(value)]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonesuch"):
        addenda.nonesuch  # noqa: B018
