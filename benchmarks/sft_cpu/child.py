"""One contestant in a process of its own, with what it used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import machine

__all__ = ["run_child"]


def run_child(command: list[str], log: Path, threads: int, variables: dict[str, str]) -> dict[str, Any]:
    """Run a command to its end; return its seconds and peak memory, and how busy other programs were."""
    environment = {
        **os.environ,
        **variables,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    busy, started = machine.busy_seconds(), time.perf_counter()
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        sys.exit(f"{' '.join(command)}\nfailed with {child.returncode}:\n{log.read_text()[-4000:]}")
    seconds = time.perf_counter() - started
    own = usage.ru_utime + usage.ru_stime
    others = (
        None if busy is None else round(max(0.0, (machine.busy_seconds() or 0.0) - busy - own) / seconds, 3)
    )
    return {
        "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "process_seconds": round(seconds, 2),
        "processor_seconds": round(own, 2),
        "processors_used_by_others": others,
    }
