"""What does an adapted chat model take on a device in llama.cpp: on disk, in time, in memory, on one core?

    python benchmarks/edge/llama_run.py ADAPTER [--calibrate DATA]

ADAPTER is a run of `addenda train` on SmolLM2. Each form is served by a process of its own, with one thread and a
context of 512 tokens: it reads 128 tokens and writes 64, five times over. What the forms answer is the gate's business.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from addenda.bases.place import in_float32
from addenda.export.gguf.adapter import write_adapter
from addenda.export.gguf.merging import write_merged_gguf
from addenda.export.gguf.origin import origin_of
from addenda.export.job import Job
from addenda.export.probes import probes_of
from addenda.recipe import load_adapted
from addenda.recipe.calibrating import calibration_rows

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sft_cpu"))

import table  # noqa: E402

README = HERE / "llama.md"
READ, WRITE, TIMES, CONTEXT = 128, 64, 5, 512
NAMES = {
    "base": "the base alone, as it came (Q4_1)",
    "adapter": "the base with the adapter beside it",
    "careful": "merged, `careful`",
    "careful+q8_0": "merged, `careful+q8_0`",
    "base+q8_0": "merged, `base+q8_0`",
    "q4_0": "merged, `q4_0`",
    "q8_0": "merged, `q8_0`",
    "f16": "merged, `f16`",
}
MERGED = tuple(name for name in NAMES if name not in {"base", "adapter"})


def quiet(_event: object) -> None:
    """Report nothing."""


def forms(adapter: str, calibrate: str, folder: Path) -> Iterator[tuple[str, Path, list[Path]]]:
    """Write one form after another; yields its name, the model's file and those of adapters."""
    base, handle, _ = load_adapted(adapter, device="cpu", on_event=quiet)
    in_float32(base.model)
    base.model.eval()
    origin = origin_of(base)
    yield "base", origin.path, []
    beside = folder / "adapter.gguf"
    write_adapter(handle, origin, beside)
    yield "adapter", origin.path, [beside]
    rows = calibration_rows(calibrate, base, quiet)
    job = Job(base.model, handle, probes_of(base), base, calibration=rows)
    for kind in MERGED:
        file = folder / f"{kind}.gguf"
        write_merged_gguf(job, origin, file, kind)
        yield kind, file, []
        file.unlink()


def measured(model: Path, adapters: Sequence[Path]) -> dict[str, Any]:
    """Serve the files, and return sizes, times and the peak of the process."""
    files = {"model": str(model), "adapters": [str(path) for path in adapters]}
    settings = {**files, "exact": False, "context": CONTEXT, "rows": 1, "threads": 1}
    started = time.monotonic()
    command = [sys.executable, "-m", "addenda.export.runtimes.llama_server", json.dumps(settings)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        address = json.loads(process.stdout.readline())["address"]
        ask(address, 1, 1)
        first = time.monotonic() - started
        timings = [ask(address, READ, WRITE)["timings"] for _ in range(TIMES)]
        peak = peak_of(process.pid)
    return {
        "bytes": sum(path.stat().st_size for path in (model, *adapters)),
        "load_and_first_seconds": first,
        "peak_bytes": peak,
        "read_ms": [each["prompt_per_token_ms"] for each in timings],
        "write_ms": [each["predicted_per_token_ms"] for each in timings],
    }


def ask(address: str, read: int, write: int) -> Any:
    """Let the server read some tokens, none of which it has seen, and write some."""
    body = {
        "prompt": list(range(300, 300 + read)), "n_predict": write, "cache_prompt": False, "ignore_eos": True,
        "temperature": 0,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=600) as answer:
        return json.loads(answer.read())


def peak_of(process: int) -> int:
    """Return the most bytes that a process had in memory, those of the mapped file among them (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def render(document: dict[str, Any]) -> str:
    """Return the table."""
    note, version = document["note"], document["versions"]["xllamacpp"]
    lines = [
        f"{document['base']}, one thread; {document['cpu']}; {document['date']}; xllamacpp {version}"
        f"{', ' + note if note else ''}. Medians of {TIMES}; peak of the whole process.",
        "",
        "| form | on disk, MB | a token read, ms | a token written, ms | load and first token, s | peak, MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in document["runs"].items():
        lines.append(
            f"| {NAMES[name]} | {run['bytes'] / 1e6:.1f} | {statistics.median(run['read_ms']):.2f} "
            f"| {statistics.median(run['write_ms']):.1f} | {run['load_and_first_seconds']:.1f} "
            f"| {run['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", help="a run of `addenda train` on SmolLM2")
    parser.add_argument("--calibrate", required=True, help="rows of the task, for the careful merges")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: measured(model, adapters)
            for name, model, adapters in forms(options.adapter, options.calibrate, Path(folder))
        }
    document = {
        "benchmark": "edge-llama",
        "base": "SmolLM2-135M-Instruct",
        "date": datetime.date.today().isoformat(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "note": options.note,
        "versions": {name: importlib.metadata.version(name) for name in ("addenda", "xllamacpp")},
        "runs": runs,
    }
    table.keep(document, HERE / "results" / f"llama-{document['date']}.json", README, render(document))


if __name__ == "__main__":
    main()
