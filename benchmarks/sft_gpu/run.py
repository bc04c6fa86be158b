"""Measure Addenda, TRL with PEFT, TRL with Liger's kernels and Unsloth side by side on one GPU, in turns.

    python benchmarks/sft_gpu/run.py --base HuggingFaceTB/SmolLM2-1.7B-Instruct --data train.jsonl --write-readme

The contestants' scripts, their stopwatch and the preparation of the rows are those of benchmarks/sft_cpu. A contestant
whose package is not installed is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CPU = HERE.parent / "sft_cpu"
sys.path.insert(0, str(CPU))

import machine  # noqa: E402
import table  # noqa: E402
from child import run_child  # noqa: E402
from rows import SUPPORT, prepare  # noqa: E402

TRL, OURS = ["trl_peer.py", "--gpu"], ["addenda_side.py", "--device", "cuda"]
CONTESTANTS = {
    "trl": TRL,
    "trl-packed": [*TRL, "--packing"],
    "trl-liger": [*TRL, "--liger"],
    "trl-liger-packed": [*TRL, "--liger", "--packing"],
    "unsloth": [*TRL, "--unsloth"],
    "addenda": OURS,
    "addenda-all": [*OURS, "--train-on", "all"],
}
NEEDS = {"trl-liger": "liger_kernel", "trl-liger-packed": "liger_kernel", "unsloth": "unsloth"}
"""What a contestant needs installed beside TRL and PEFT."""
LABELS = table.LABELS | {
    "trl-liger": "TRL + PEFT + Liger",
    "trl-liger-packed": "TRL + PEFT + Liger, `packing=True`",
    "unsloth": "Unsloth with TRL's trainer",
}
PACKAGES = ("triton", "liger-kernel", "unsloth")


def main() -> None:
    """Prepare the rows, run every contestant in turns, write and print the results."""
    options = parse_options()
    missing = {name: NEEDS[name] for name in options.contestants if name in NEEDS and not there(NEEDS[name])}
    with tempfile.TemporaryDirectory(prefix="addenda-bench-") as name:
        work = Path(name)
        prepared = prepare(options, work, options.base)
        document = open_document(options, prepared, missing)
        for repeat in range(options.repeats):
            for contestant in (name for name in options.contestants if name not in document["left_out"]):
                try:
                    document["runs"].append(measure(contestant, repeat, work, options, prepared))
                except SystemExit as failed:  # one contestant that fails is a result; the others go on
                    print(failed, flush=True)
                    document["left_out"][contestant] = "it failed: " + str(failed).splitlines()[-1]
    document["summary"] = table.summarize(document["runs"])
    print(render(document))
    path = HERE / "results" / f"{document['date']}-{document['data']['title']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")
    if options.write_readme:
        table.write_readme(HERE / "README.md", render(document))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="smollm2-135m-instruct", help="a name, a folder or a hub id")
    parser.add_argument("--base-title", help="what the results call the base; default: as it is given")
    parser.add_argument("--data", type=Path, default=SUPPORT, help="jsonl of chats or of question and answer")
    parser.add_argument("--title", help="what the results call the data; default: the file's name")
    parser.add_argument("--rows", type=int, default=1000, help="use the first so many rows")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each run")
    parser.add_argument(
        "--warmup", type=int, default=5, help="steps before the clock starts; forms are compiled then"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    return parser.parse_args()


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def open_document(
    options: argparse.Namespace, prepared: dict[str, Any], missing: dict[str, str]
) -> dict[str, Any]:
    versions = machine.versions() | {
        name: importlib.metadata.version(name) for name in PACKAGES if there(name.replace("-", "_"))
    }
    return {
        "benchmark": "sft_gpu",
        "date": datetime.date.today().isoformat(),
        "machine": {**machine.describe(), "gpu": gpu_name()},
        "versions": versions,
        "base": {"name": options.base_title or options.base, "parameters": prepared["parameters"]},
        "adapter": "LoRA, rank 16, alpha 32, all linear layers but the output head",
        "data": prepared["data"],
        "settings": {name: getattr(options, name) for name in ("dtype", "steps", "warmup", "repeats")},
        "left_out": {name: f"{package} is not installed" for name, package in missing.items()},
        "runs": [],
    }


def gpu_name() -> str:
    """Return the first GPU, its memory and its driver, as the driver tells them; ends where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        sys.exit("no NVIDIA GPU answers; benchmarks/sft_cpu/run.py measures on the CPU")


def measure(
    contestant: str, repeat: int, work: Path, options: argparse.Namespace, prepared: dict[str, Any]
) -> dict[str, Any]:
    """Run one contestant in a process of its own; its peak is what PyTorch held of the GPU."""
    name, threads = f"{contestant}-{repeat}", machine.describe()["cores"]
    script, *flags = CONTESTANTS[contestant]
    out = work / f"{name}.json"
    command = [sys.executable, str(CPU / script), *flags, "--model", prepared["folder"]]
    command += ["--data", str(work / "train.jsonl"), "--work", str(work / name), "--out", str(out)]
    command += ["--threads", str(threads), "--warmup", str(options.warmup), "--steps", str(options.steps)]
    command += ["--dtype", options.dtype]
    print(f"{name} ...", end=" ", flush=True)
    usage = run_child(command, work / f"{name}.log", threads, {"CUDA_VISIBLE_DEVICES": "0"})
    result = json.loads(out.read_text(encoding="utf-8"))
    peaks = {"peak_memory_bytes": result["gpu_peak_bytes"], "peak_rss_bytes": usage.pop("peak_memory_bytes")}
    print(
        f"{result['tokens_per_second']:.0f} tokens/s, {peaks['peak_memory_bytes'] / 2**20:.0f} MiB",
        flush=True,
    )
    return {"contestant": contestant, "repeat": repeat, **result, **usage, **peaks}


def render(document: dict[str, Any]) -> str:
    """Return the Markdown table with what it was measured on, and who was left out."""
    data, settings, ratios = document["data"], document["settings"], document["summary"]["ratios"]
    steps = f"{settings['steps']} steps after {settings['warmup']}"
    lines = [
        f"{data['title']}: {data['rows']:,} rows, {data['tokens_per_row']['mean']:.0f} tokens each on average; "
        f"{document['base']['name']}; {document['machine']['gpu']}; {settings['dtype']}; {steps}, "
        f"median of {settings['repeats']} alternating runs, range in brackets; {document['date']}. "
        + ", ".join(f"{name} {version}" for name, version in document["versions"].items())
        + ".",
        "",
        "| contestant | tokens/s | peak of the GPU's memory, MiB | speed of Addenda to it | memory of Addenda to it |",
        "|---|---:|---:|---:|---:|",
    ]
    rows = document["summary"]["contestants"].items()
    lines += [table.row(LABELS[name], row, ratios.get(f"addenda / {name}")) for name, row in rows]
    return "\n".join([*lines, *(f"\n{LABELS[name]}: {why}." for name, why in document["left_out"].items())])


if __name__ == "__main__":
    main()
