from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from addenda.train.interrupt import Interrupted, Interrupts


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_wish_and_handlers_are_put_back(signum, code):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with Interrupts() as interrupts:
        assert not interrupts.requested
        os.kill(os.getpid(), signum)
        assert interrupts.requested
        assert signal.getsignal(signum) is signal.SIG_DFL
    assert {s: signal.getsignal(s) for s in before} == before
    error = Interrupted(interrupts.signum, "checkpoints/step-000001")
    assert error.exit_code == code
    assert "step-000001" in str(error)
    assert isinstance(error, KeyboardInterrupt)


def test_inside_at_once_the_signal_raises():
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted), interrupts.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested


def test_in_another_thread_no_signal_is_caught():
    seen = []

    def work():
        with Interrupts() as interrupts:
            seen.append(interrupts.active)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_ends_the_process_within_two_seconds():
    code = """
import time
from addenda.train.interrupt import Interrupts
with Interrupts() as interrupts:
    print("ready", flush=True)
    while not interrupts.requested:
        time.sleep(0.01)
    print("saving", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "saving\n"
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert time.monotonic() - began < 2.0
