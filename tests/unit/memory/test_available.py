from __future__ import annotations

import sys

import psutil
import pytest

from addenda.bases import weights
from addenda.memory import available
from addenda.memory.available import available_memory

MIB = 2**20


@pytest.fixture
def container(tmp_path):
    """Make a folder of control groups; returns it, and the file that names the process's own."""

    def make(name, **groups):
        for group, (limit, used, droppable) in groups.items():
            folder = tmp_path / "groups" / group.replace("_", "/").strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "memory.max").write_text(f"{limit}\n")
            (folder / "memory.current").write_text(f"{used}\n")
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")
        own = tmp_path / "cgroup"
        own.write_text(f"1:name=systemd:/other\n0::{name}\n")
        return tmp_path / "groups", own

    return make


def test_a_container_leaves_its_limit_less_what_it_holds(container):
    assert available_memory(*container("/", _=(10 * MIB, 4 * MIB, 0))) == 6 * MIB


def test_files_that_were_read_can_be_dropped(container):
    assert available_memory(*container("/", _=(10 * MIB, 9 * MIB, 3 * MIB))) == 4 * MIB


def test_the_tightest_group_around_the_process_counts(container):
    groups, own = container(
        "/pod/box", _=("max", 0, 0), pod=(7 * MIB, 2 * MIB, 0), pod_box=(9 * MIB, MIB, 0), other=(MIB, 0, 0)
    )
    assert available_memory(groups, own) == 5 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(container):
    assert available_memory(*container("/", _=(3 * MIB, 4 * MIB, 0))) == 0


@pytest.mark.parametrize("limit", ["max", str(sys.maxsize)])
def test_without_a_limit_the_machine_counts(container, limit):
    free = psutil.virtual_memory().available
    assert available_memory(*container("/", _=(limit, 0, 0))) == pytest.approx(free, rel=0.2)


def test_without_control_groups_the_machine_counts(tmp_path):
    free = psutil.virtual_memory().available
    assert available_memory(tmp_path / "none", tmp_path / "none") == pytest.approx(free, rel=0.2)


def test_the_form_of_the_weights_heeds_the_container(container, monkeypatch):
    groups, own = container("/", _=(100 * MIB, 0, 0))
    monkeypatch.setattr(weights, "available_memory", lambda: available.available_memory(groups, own))
    assert weights.choose("auto", parameters=20 * MIB, itemsize=4).form == "packed"
    assert weights.choose("auto", parameters=10 * MIB, itemsize=4).form == "dense"
