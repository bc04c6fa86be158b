"""Several processes train as one does: same rows, same losses, same adapter; and none waits for one that has gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_together

from addenda.cli.app import run
from addenda.core import registry
from addenda.core.mixing import Mixture
from addenda.train.checkpoint import find_checkpoint
from addenda.train.metrics import read_metrics

ALONE = [name for name in registry.names() if name != "lora" and not issubclass(registry.get(name), Mixture)]
"""Every method that needs no other adapters on the model; LoRA is what the other tests train."""
EVERY_DAY = {
    "adalora",  # changes in training what it holds
    "bottleneck",  # stands on blocks
    "dora",  # reads the weight
    "full",  # is as large as the layer
    "lora-experts",  # sums over the processes
    "oft",  # turns the input
    "osf",  # is decomposed from the weight
    "prefix-tuning",  # changes the sequence
    "reft",  # stands on what blocks return
    "shadow",  # has blocks of its own
    "trainable-tokens",  # stands on the embedding
    "vera",  # shares tensors between layers
}
"""One method of each way to stand on a model; the slow suite has all."""
SECONDS = 45
"""How long processes may take that end by themselves."""


@pytest.fixture(scope="module")
def context():
    """Start processes that have PyTorch and the tiny model's script loaded already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train_together", "bitsandbytes"])  # the latter if it is there
        yield context


@pytest.fixture(scope="module")
def seed():
    return random.randrange(10**6)


@pytest.fixture(scope="module")
def alone(context, seed, tmp_path_factory):
    """The run of one process: its folder."""
    folder = tmp_path_factory.mktemp("alone")
    assert ended(start(context, 1, folder, seed=seed)) == [0]
    return folder


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(context, size, *arguments, function="process", of_rank=None, **settings):
    """Start ``size`` processes; ``of_rank`` holds further settings for some of them."""
    port = free_port()
    found = []
    for rank in range(size):
        given = {**settings, **(of_rank or {}).get(rank, {})}
        target = getattr(train_together, function)
        found.append(
            context.Process(target=target, args=(rank, size, port, *map(str, arguments)), kwargs=given)
        )
        found[-1].start()
    return found


def ended(processes):
    """Wait for the processes, and return their exit codes."""
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, f"still running after {SECONDS} s: {codes}"
    return codes


def saw(folder, rank=0):
    return json.loads((folder / f"process-{rank}.json").read_text())


def losses(folder):
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["event"] == "step"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def assert_same_run(folder, alone, *, ranks):
    """The losses of every step and evaluation are those of one process, but for the order of additions."""
    assert losses(folder) == pytest.approx(losses(alone), rel=1e-6, abs=1e-6)
    seen = [saw(folder, rank) for rank in range(ranks)]
    for one in seen:
        assert one["evaluations"] == pytest.approx(saw(alone)["evaluations"], rel=1e-6, abs=1e-6)
        assert one["adapter"] == seen[0]["adapter"]


def is_subsequence(part, whole):
    places = iter(whole)
    return all(item in places for item in part)


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_give_the_losses_of_one_on_the_same_rows(context, alone, seed, tmp_path, size):
    assert ended(start(context, size, tmp_path, seed=seed)) == [0] * size
    assert_same_run(tmp_path, alone, ranks=size)
    parts, whole = [saw(tmp_path, rank)["micro_batches"] for rank in range(size)], saw(alone)["micro_batches"]
    assert all(is_subsequence(part, whole) for part in parts)
    assert sorted(batch for part in parts for batch in part) == sorted(whole)


@pytest.mark.parametrize("blocks_run_again", [(0, 0), (2, 1)])
def test_sharded_blocks_give_the_losses_of_one_process_and_are_whole_afterwards(
    context, alone, seed, tmp_path, blocks_run_again
):
    again = {rank: {"blocks_run_again": count} for rank, count in enumerate(blocks_run_again)}
    assert ended(start(context, 2, tmp_path, seed=seed, config={"sharding": "full"}, of_rank=again)) == [0, 0]
    assert_same_run(tmp_path, alone, ranks=2)
    whole = saw(alone)["held"][0]
    for rank in range(2):
        seen = saw(tmp_path, rank)
        assert seen["base_is_as_before"]
        assert seen["codes_is_the_same_parameter"]
        # Rows are dealt out: where their number is odd, one process holds one row more.
        assert max(seen["held"]) <= whole / 2 + 8
    assert len(saw(tmp_path, 0)["held"]) == len(saw(tmp_path, 1)["held"])


@pytest.mark.parametrize("sharding", ["none", "full"])
@pytest.mark.parametrize("whose", ["ours", "bitsandbytes"])
def test_a_base_in_four_bits_gives_the_losses_of_one_process(context, seed, tmp_path, whose, sharding):
    if whose == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, size in ((one, 1), (two, 2)):
        folder.mkdir()
        config = {"sharding": sharding, "epochs": 1}
        running = start(context, size, folder, seed=seed, config=config, four_bits=whose)
        assert ended(running) == [0] * size
    assert_same_run(two, one, ranks=2)
    for rank in range(2):
        assert saw(two, rank)["base_is_as_before"]
        halved = max(saw(two, rank)["held"]) <= saw(one)["held"][0] / 2 + 8
        assert halved == (sharding == "full" and whose == "ours")


@pytest.mark.parametrize(
    "method", [pytest.param(n, marks=() if n in EVERY_DAY else pytest.mark.slow) for n in ALONE]
)
def test_sharded_blocks_suit_every_method(context, seed, tmp_path, method):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = {"seed": seed, "method": method}
    for folder, size in ((one, 1), (two, 2)):
        folder.mkdir()
        config = {"sharding": "full", "epochs": 1}
        assert ended(start(context, size, folder, config=config, **settings)) == [0] * size
    assert_same_run(two, one, ranks=2)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_a_run_resumes_on_another_number_of_processes(context, alone, seed, tmp_path, before, after):
    last = {before - 1: {"failpoints": "step.before_update=kill@8"}}
    codes = ended(start(context, before, tmp_path, seed=seed, of_rank=last))
    assert codes[-1] == -signal.SIGKILL
    assert 0 not in codes
    assert find_checkpoint(tmp_path / "checkpoints").folder.name == "step-000006"
    assert ended(start(context, after, tmp_path, seed=seed, resume=True)) == [0] * after
    assert_same_run(tmp_path, alone, ranks=after)
    parts = [saw(tmp_path, rank)["micro_batches"] for rank in range(after)]
    assert all(is_subsequence(part, saw(alone)["micro_batches"]) for part in parts)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("settings", [{"failpoints": "step.before_update=kill@3"}, {"other_rows": True}])
def test_when_one_process_fails_none_waits(context, seed, tmp_path, failing, settings):
    codes = ended(start(context, 2, tmp_path, seed=seed, of_rank={failing: settings}))
    assert 0 not in codes
    if "other_rows" in settings:  # the two differ, whichever of them is the odd one
        assert "training rows" in saw(tmp_path, 1)["error"]
        assert "do not train the same run" in saw(tmp_path, 1)["error"]
    else:
        assert codes[failing] == -signal.SIGKILL
        assert "TrainingError: another process of this run ended" in saw(tmp_path, 1 - failing)["error"]


def test_a_signal_to_one_process_stops_all_with_a_checkpoint(context, alone, seed, tmp_path):
    running = start(context, 2, tmp_path, seed=seed, seconds_per_step=0.1)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + SECONDS
    while not (metrics.exists() and len(read_metrics(metrics)) > 6) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(running[1].pid, signal.SIGTERM)
    assert ended(running) == [128 + signal.SIGTERM] * 2
    assert all("interrupted; saved in" in saw(tmp_path, rank)["error"] for rank in range(2))
    done = read_metrics(metrics)[-1]["step"]
    assert find_checkpoint(tmp_path / "checkpoints").folder.name == f"step-{done:06d}"
    assert done < len(losses(alone))
    assert ended(start(context, 2, tmp_path, seed=seed, resume=True)) == [0, 0]
    assert_same_run(tmp_path, alone, ranks=2)


def test_processes_that_must_wait_are_spoken_of(context, seed, tmp_path):
    config = {"batch_size": 1, "max_steps": 2}
    assert ended(start(context, 2, tmp_path, seed=seed, config=config)) == [0, 0]
    lines = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["event"] == "notice"]
    said = [line["message"] for line in lines if "2 processes share 1 micro-batch a step" in line["message"]]
    assert len(said) == 1


def test_messages_arrive_as_they_were_sent(context, seed):
    assert ended(start(context, 3, function="exchange", seed=seed)) == [0, 0, 0]


def test_torchrun_runs_the_command_line_as_it_is(tiny_model, chat_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "train", str(chat_rows), "--base", str(tiny_model), "--json",
        "--set", "train.tokens_per_micro_batch=100", "--set", "train.epochs=2", "--set", "base.dtype=float32",
        "--set", "evals.samples=1", "--set", "evals.max_new_tokens=4",
    ]  # fmt: skip
    assert run(command) == 0
    one = json.loads(capsys.readouterr().out)
    torchrun = [
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "addenda",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, *command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert Path(two["folder"]) == Path("runs/rows-lora-2")  # chosen once, for both
    for figure in ("heldout_nll_after", "heldout_nll_before", "base_kl_general"):
        assert two[figure] == pytest.approx(one[figure], rel=1e-6, abs=1e-6)
    assert done.stderr.count("held-out rows:") == 1
    assert ", 2 processes," in done.stderr
