"""A run that is killed, interrupted or starved of disk goes on from its checkpoint and ends with the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_tiny as tiny

from addenda.errors import BusyError, CheckpointError, DiskFullError
from addenda.train.checkpoint import find_checkpoint, load_checkpoint, verify_checkpoint
from addenda.train.config import TrainConfig
from addenda.train.events import CheckpointEvent, NoticeEvent, ResumeEvent, StepEvent
from addenda.train.failpoints import FAILPOINTS
from addenda.train.loop import train
from addenda.train.metrics import read_metrics

SCRIPT = Path(tiny.__file__)

TIMES = {"seconds", "eta_seconds", "tokens_per_second", "folder", "bytes"}


@pytest.fixture(scope="module")
def processes():
    """Start processes that have PyTorch loaded already; ``kill -9`` of one harms nobody else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", str(SCRIPT.parent)
        )  # read by the server when it loads the module beforehand
        patch.syspath_prepend(str(SCRIPT.parent))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train_tiny"])
        yield context


@pytest.fixture(scope="module")
def unbroken(processes, tmp_path_factory):
    """The run that nothing disturbs: its folder, and how long it took."""
    folder = tmp_path_factory.mktemp("unbroken")
    start(processes, folder).join()
    began = time.monotonic()
    second = tmp_path_factory.mktemp("unbroken-again")
    start(processes, second).join()
    assert result_of(second) == result_of(folder)
    return folder, time.monotonic() - began


def start(processes, folder, *, resume=False, failpoints="", seconds_per_step=0.0):
    environment = {"ADDENDA_FAILPOINTS": failpoints, "OMP_NUM_THREADS": "1"}
    settings = {"resume": resume, "environment": environment, "seconds_per_step": seconds_per_step}
    process = processes.Process(target=tiny.child, args=(str(folder),), kwargs=settings)
    process.start()
    return process


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def logged(folder):
    """The steps and evaluations of a run, without what a clock says."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["event"] in ("step", "eval")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_whole(folder):
    """Everything that is called a checkpoint verifies; half-written things are under another name."""
    parent = folder / "checkpoints"
    for entry in parent.iterdir() if parent.exists() else ():
        assert entry.name.startswith(".tmp-") or verify_checkpoint(entry) == "", entry


def assert_resumed_to_the_same(processes, folder, unbroken):
    process = start(processes, folder, resume=True)
    process.join()
    assert process.exitcode == 0
    assert result_of(folder) == result_of(unbroken[0])
    assert logged(folder) == logged(unbroken[0])
    assert not list((folder / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize("passage", [1, 3])
@pytest.mark.parametrize("name", FAILPOINTS)
def test_killed_at_any_failpoint_it_resumes_to_the_same_bits(processes, unbroken, tmp_path, name, passage):
    if name == "finish" and passage > 1:
        pytest.skip("a run finishes once")
    process = start(processes, tmp_path, failpoints=f"{name}=kill@{passage}")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert_whole(tmp_path)
    assert_resumed_to_the_same(processes, tmp_path, unbroken)


def killed_at_random(processes, unbroken, folder, seed):
    generator = random.Random(seed)
    process = start(processes, folder)
    time.sleep(generator.uniform(0.0, 1.2 * unbroken[1]))
    process.kill()
    process.join()
    assert_whole(folder)
    assert_resumed_to_the_same(processes, folder, unbroken)


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_a_random_time_it_resumes_to_the_same_bits(processes, unbroken, tmp_path, seed):
    killed_at_random(processes, unbroken, tmp_path, seed)
    assert result_of(tmp_path) == result_of(unbroken[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1300))
def test_killed_at_a_random_time_three_hundred_times(processes, unbroken, tmp_path, seed):
    killed_at_random(processes, unbroken, tmp_path, seed)
    assert result_of(tmp_path) == result_of(unbroken[0])


def test_killed_again_and_again_it_still_ends_with_the_same_bits(processes, unbroken, tmp_path):
    for place in ("step.after_update=kill@3", "checkpoint.rotate=kill@1", "evaluate=kill@2", "finish=kill"):
        process = start(processes, tmp_path, resume=True, failpoints=place)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert_resumed_to_the_same(processes, tmp_path, unbroken)


def test_a_finished_run_resumes_to_its_end_without_a_step(unbroken, tmp_path):
    _, before = tiny.run(tmp_path)
    events = []
    result, handle = tiny.run(tmp_path, resume=True, on_event=events.append)
    assert tiny.digest(handle) == tiny.digest(before) == result_of(unbroken[0])["sha256"]
    assert result.steps == 9
    assert not [event for event in events if isinstance(event, StepEvent)]


# ------------------------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture
def two_checkpoints(tmp_path):
    """A run killed after its third checkpoint: steps 4 and 6 are there."""

    def stop(event):
        if isinstance(event, StepEvent) and event.step == 7:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        tiny.run(tmp_path, on_event=stop)
    parent = tmp_path / "checkpoints"
    assert sorted(entry.name for entry in parent.iterdir()) == ["step-000004", "step-000006"]
    return tmp_path


def truncate(file):
    os.truncate(file, random.randrange(file.stat().st_size))


def flip(file):
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"]
)
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(two_checkpoints, unbroken, damage, name):
    damage(two_checkpoints / "checkpoints" / "step-000006" / name)
    events = []
    _, handle = tiny.run(two_checkpoints, resume=True, on_event=events.append)
    assert isinstance(events[0], ResumeEvent)
    assert events[0].step == 4
    [skipped] = events[0].skipped
    assert name in skipped
    assert "step-000006" in skipped
    assert tiny.digest(handle) == result_of(unbroken[0])["sha256"]
    assert logged(two_checkpoints) == logged(unbroken[0])


def test_when_every_checkpoint_is_damaged_the_run_is_refused_with_each_reason(two_checkpoints):
    for folder in (two_checkpoints / "checkpoints").iterdir():
        (folder / "state.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be used") as caught:
        tiny.run(two_checkpoints, resume=True)
    assert list(caught.value.where.values()) == ["state.json is missing"] * 2


def test_resuming_before_the_first_checkpoint_starts_from_the_beginning_and_says_so(unbroken, tmp_path):
    events = []
    _, handle = tiny.run(tmp_path, resume=True, on_event=events.append)
    assert any("starting from the beginning" in e.message for e in events if isinstance(e, NoticeEvent))
    assert tiny.digest(handle) == result_of(unbroken[0])["sha256"]


# ------------------------------------------------------------------------------------------------------ another run


def resume_with(folder, *, base=None, rows=None, rank=4, identity=None, **config):
    base = base or tiny.make_base()
    settings = TrainConfig(**{**tiny.CONFIG, **config})
    train(
        base, tiny.attach(base, rank=rank), rows or tiny.make_rows(10), tiny.make_rows(4, seed=1), settings,
        run_dir=folder, on_event=lambda event: None, resume=True, identity=identity,
    )  # fmt: skip


def changed_rows():
    rows = tiny.make_rows(10)
    row = rows[3]
    return [
        *rows[:3],
        type(row)((*row.input_ids[:-1], row.input_ids[-1] ^ 1), row.trained, row.row),
        *rows[4:],
    ]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 1}, ["train.seed"]),
        ({"epochs": 4}, ["train.epochs"]),
        ({"learning_rate": 1e-3, "batch_size": 5}, ["train.batch_size", "train.learning_rate"]),
        ({"rows": changed_rows()}, ["training rows"]),
        ({"rows": tiny.make_rows(9)}, ["training rows"]),
        ({"base": tiny.make_base(seed=1)}, ["base weights"]),
        ({"base": tiny.make_base(dtype=torch.bfloat16)}, ["base dtype"]),
        ({"rank": 2}, ["adapter before training", "method"]),
        ({"identity": {"chat template": "other"}}, ["chat template"]),
    ],
)
def test_another_run_is_refused_and_every_difference_listed(two_checkpoints, change, names):
    with pytest.raises(CheckpointError, match=f"belongs to: {len(names)} difference") as caught:
        resume_with(two_checkpoints, **change)
    assert list(caught.value.where) == names
    assert all("in the checkpoint" in text for text in caught.value.where.values())
    assert load_checkpoint(find_checkpoint(two_checkpoints / "checkpoints").folder).step == 6


def test_settings_that_change_no_number_may_change(two_checkpoints):
    resume_with(two_checkpoints, save_every_steps=None, save_every_minutes=1.0, keep_checkpoints=3)
    folder = find_checkpoint(two_checkpoints / "checkpoints").folder
    assert load_checkpoint(folder).state["run"]["finished"] is True


def test_another_thread_count_is_said(two_checkpoints):
    events = []
    tiny.run(two_checkpoints, resume=True, config={"threads": 2}, on_event=events.append)
    notices = [event.message for event in events if isinstance(event, NoticeEvent)]
    assert notices[0] == "CPU threads was 1 when the run was saved and is 2 now: the last bits may differ"


# ------------------------------------------------------------------------------------ full disk, busy folder, signals


@pytest.mark.parametrize("place", ["checkpoint.write", "checkpoint.fsync", "checkpoint.before_rename"])
def test_a_full_disk_ends_the_run_with_the_checkpoint_before_whole(tmp_path, unbroken, monkeypatch, place):
    monkeypatch.setattr("addenda.train.failpoints._passed", {})
    monkeypatch.setenv("ADDENDA_FAILPOINTS", f"{place}=enospc@{2 if 'rename' in place else 8}")
    with pytest.raises(DiskFullError) as caught:
        tiny.run(tmp_path)
    assert caught.value.exit_code == 6
    assert {"path", "need", "free"} <= set(caught.value.where)
    monkeypatch.delenv("ADDENDA_FAILPOINTS")
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    _, handle = tiny.run(tmp_path, resume=True)
    assert tiny.digest(handle) == result_of(unbroken[0])["sha256"]


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_lives(processes, tmp_path):
    first = start(processes, tmp_path, seconds_per_step=0.3)
    while not (tmp_path / "metrics.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(BusyError, match=f"process id: {first.pid}"):
        tiny.run(tmp_path)
    first.kill()
    first.join()
    tiny.run(tmp_path, resume=True)
    assert logged(tmp_path)[-1]["step"] == 9


def script(folder, *arguments):
    command = [sys.executable, "-u", str(SCRIPT), str(folder), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def read_until(process, **wanted):
    for line in process.stdout:
        if wanted.items() <= json.loads(line).items():
            return
    pytest.fail(f"the run ended before {wanted}: {process.stderr.read()}")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_exits_and_the_run_resumes_to_the_same_bits(tmp_path, unbroken, signum, code):
    process = script(tmp_path, "--await-signal-after", 5)
    read_until(process, event="StepEvent", step=5)
    process.send_signal(signum)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    last = json.loads(output.splitlines()[-1])
    assert (last["event"], Path(last["checkpoint"]).name) == ("Interrupted", "step-000005")
    assert verify_checkpoint(Path(last["checkpoint"])) == ""
    _, handle = tiny.run(tmp_path, resume=True)
    assert tiny.digest(handle) == result_of(unbroken[0])["sha256"]
    assert logged(tmp_path) == logged(unbroken[0])


def test_a_signal_during_an_evaluation_is_not_kept_waiting(tmp_path):
    process = script(tmp_path, "--seconds-per-evaluation", 60)
    read_until(process, event="evaluating")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    assert json.loads(output.splitlines()[-1])["checkpoint"].endswith("step-000000")


def test_a_step_given_up_halfway_is_run_again_with_the_same_bits(tmp_path, unbroken, monkeypatch):
    """The signal comes between two micro-batches of step 5, after dropout has drawn numbers for the first."""
    from addenda.train import loop
    from addenda.train.interrupt import Interrupted

    seen, loss = [], loop.packed_loss

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*args, **kwargs)

    monkeypatch.setattr(loop, "packed_loss", interrupted)
    with pytest.raises(Interrupted) as caught:
        tiny.run(tmp_path)
    step = load_checkpoint(Path(caught.value.checkpoint)).step
    monkeypatch.setattr(loop, "packed_loss", loss)
    _, handle = tiny.run(tmp_path, resume=True)
    assert 0 < step < 9
    assert tiny.digest(handle) == result_of(unbroken[0])["sha256"]
    assert logged(tmp_path) == logged(unbroken[0])


def test_checkpoints_are_made_when_due(tmp_path):
    events = []
    tiny.run(tmp_path, config={"save_every_steps": 4, "keep_checkpoints": 3}, on_event=events.append)
    saved = [event for event in events if isinstance(event, CheckpointEvent)]
    assert [event.step for event in saved] == [4, 8, 9]
    assert all(event.bytes > 1000 and event.seconds >= 0 for event in saved)
    events.clear()
    tiny.run(
        tmp_path / "timed",
        config={"save_every_steps": None, "save_every_minutes": 1e-9},
        on_event=events.append,
    )
    assert [event.step for event in events if isinstance(event, CheckpointEvent)] == list(range(1, 10))
