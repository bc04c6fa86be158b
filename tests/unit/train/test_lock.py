from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from addenda.errors import BusyError
from addenda.train.lock import lock_run

HOLD = """
import sys, time
from addenda.train.lock import lock_run
with lock_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""
TRY = """
import sys, time
from addenda.errors import BusyError
from addenda.train.lock import lock_run
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
try:
    with lock_run(sys.argv[1]):
        time.sleep(1.0)
except BusyError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def start(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_second_process_is_refused_with_the_first_ones_number(tmp_path):
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == "held\n"
    began = time.monotonic()
    with pytest.raises(BusyError, match=f"process id: {holder.pid}") as caught, lock_run(tmp_path):
        pass
    assert time.monotonic() - began < 1.0
    assert caught.value.exit_code == 7
    holder.kill()
    holder.communicate()
    with lock_run(tmp_path):  # free at once after kill -9
        assert int((tmp_path / ".lock").read_text()) == os.getpid()


def test_of_processes_that_start_together_exactly_one_runs(tmp_path):
    begin = time.time() + 1.5
    started = [start(TRY, tmp_path, begin) for _ in range(4)]
    answers = [process.communicate()[1] for process in started]
    codes = [process.returncode for process in started]
    assert sorted(codes) == [0, 7, 7, 7]
    winner = started[codes.index(0)].pid
    assert all(f"process id: {winner}" in text for text, code in zip(answers, codes, strict=True) if code)


def test_the_same_thread_may_nest_and_another_thread_may_not(tmp_path):
    refused = []

    def attempt():
        try:
            with lock_run(tmp_path):
                refused.append(False)
        except BusyError:
            refused.append(True)

    with lock_run(tmp_path):
        with lock_run(tmp_path / "." / ".." / tmp_path.name):
            pass
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join()
    attempt()
    assert refused == [True, False]


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(ValueError, match="oops"), lock_run(tmp_path):
        raise ValueError("oops")
    holder = start(HOLD, tmp_path)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
