"""What does a chat model with LoRA weigh, take and need in ExecuTorch with a cache, beside PyTorch, on one core?

    make test-edge                                               # brings the program
    .venv/bin/python benchmarks/executorch/decoder.py

Each contestant reads a prompt and then writes token by token, in turns, in a process of its own that is held to one
core. Programs are kept between runs in ``--programs``: writing one takes minutes.
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
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sft_cpu"))

import table  # noqa: E402

FORMS = {
    "pytorch": "PyTorch, merged",
    "pytorch-whole": "PyTorch, merged, without a cache",
    "executorch": "ExecuTorch, float32",
}


def adapted() -> tuple[Any, Any]:
    """Return the embedded base and a LoRA of rank 8 on it, of random values: neither size nor speed depends on them."""
    import torch

    import addenda
    from addenda.bases import load_base

    base = load_base("smollm2-135m-instruct", weights="dense")
    base.model.float()
    handle = addenda.attach(base.model, addenda.LoRA(rank=8), ["q_proj", "v_proj"], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.02)
    return base, handle


def reader(form: str, path: Path) -> tuple[int, Any]:
    """Return the size in bytes, and a function that reads ids (1, n) after those before and returns the next token."""
    import torch

    if form == "executorch":
        from addenda.export.runtimes.executorch import Decoder, Program

        decoder = Decoder(Program(path))
        return path.stat().st_size, lambda ids: int(decoder.read(ids[0]).argmax())
    base, handle = adapted()
    handle.merge()
    model = base.model.eval()
    held: dict[str, Any] = {"cache": None, "ids": torch.zeros(1, 0, dtype=torch.long)}

    def whole(ids: Any) -> int:
        held["ids"] = torch.cat([held["ids"], ids], 1)
        return int(model(held["ids"], use_cache=False, logits_to_keep=1).logits[0, -1].argmax())

    def cached(ids: Any) -> int:
        output = model(ids, past_key_values=held["cache"], use_cache=True, logits_to_keep=1)
        held["cache"] = output.past_key_values
        return int(output.logits[0, -1].argmax())

    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return size, whole if form == "pytorch-whole" else cached


def child(form: str, path: Path, prompt: int, tokens: int) -> None:
    """Measure one contestant on one core and print one JSON object."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import psutil
    import torch
    import transformers  # noqa: F401  (what imports take is no part of what the model takes)

    import addenda  # noqa: F401

    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(1000, 40000, (1, prompt))
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    size, read = reader(form, path)
    loaded, seconds = time.perf_counter() - began, []
    with torch.no_grad():
        for _ in range(1 + tokens):
            start, busy = time.perf_counter(), time.process_time()
            token = read(ids)
            seconds.append((time.perf_counter() - start, time.process_time() - busy))
            ids = torch.tensor([[token]])
    print(
        json.dumps(
            {
                "bytes": size,
                "load_seconds": loaded,
                "prompt": seconds[0],
                "tokens": seconds[1:],
                "held_bytes": psutil.Process().memory_info().rss - before,
            }
        )
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write the program if it is not there, run every contestant in turns, and return the document."""
    folder = options.programs / f"smollm2-{options.context}"
    if not folder.exists():
        from addenda.export.run import export_adapter

        export_adapter(*adapted(), "executorch", folder, context=options.context, allow_drift=True)
    runs = []
    for form in [form for _ in range(options.repeats) for form in FORMS]:
        command = [sys.executable, __file__, "--child", form, str(folder / "model.pte")]
        sizes = ["--prompt", str(options.prompt), "--tokens", str(options.tokens)]
        done = subprocess.run([*command, *sizes], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{form}: {done.stderr[-2000:]}")
        runs.append({"form": form, **json.loads(done.stdout.splitlines()[-1])})
    names = ("torch", "transformers", "executorch")
    return {
        "benchmark": "executorch-decoder",
        "date": datetime.date.today().isoformat(),
        "cpu": f"one of {os.cpu_count()} cores, {platform.machine()}",
        "settings": {
            "context": options.context,
            "prompt": options.prompt,
            "tokens": options.tokens,
            "repeats": options.repeats,
            "note": options.note,
        },
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "runs": runs,
    }


def render(document: dict[str, Any]) -> str:
    """Return the table."""
    settings = document["settings"]
    note = f", {settings['note']}" if settings["note"] else ""
    lines = [
        f"SmolLM2-135M; a prompt of {settings['prompt']} tokens, then {settings['tokens']} tokens; a cache for "
        f"{settings['context']}; medians of {settings['repeats']} turns; {document['date']}, {document['cpu']}{note}.",
        "",
        "| contestant | size, MB | prompt, tokens a second | a token, ms of the processor | held in memory, MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for form, name in FORMS.items():
        own = [run for run in document["runs"] if run["form"] == form]
        prompt = settings["prompt"] / statistics.median(run["prompt"][1] for run in own)
        token = statistics.median(1e3 * busy for run in own for _, busy in run["tokens"])
        held = statistics.median(run["held_bytes"] for run in own) / 1e6
        lines.append(f"| {name} | {own[0]['bytes'] / 1e6:.0f} | {prompt:.0f} | {token:.0f} | {held:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, default=512, help="tokens for which the cache has room")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--programs", type=Path, default=HERE / "programs")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), options.prompt, options.tokens)
        return
    document = measure(options)
    path = HERE / "results" / f"{document['date']}-decoder.json"
    table.keep(document, path, HERE / "decoder.md", render(document))


if __name__ == "__main__":
    main()
