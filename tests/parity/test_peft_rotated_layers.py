"""Rotations on embeddings and convolutions go to PEFT and come back; what PEFT does otherwise is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import addenda
from addenda.export.peft import import_peft, write_peft
from addenda.methods.boft import BOFT
from addenda.methods.fourierft import FourierFT
from addenda.methods.hra import HRA
from addenda.methods.oft import OFT
from addenda.methods.psoft import PSOFT
from addenda.methods.road import RoAd
from addenda.methods.waveft import WaveFT

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
]


class Seeing(nn.Module):
    """Rows of token ids become a small picture, which is convolved."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 24)
        self.look = nn.Conv2d(4, 6, 3, padding=1, stride=2)
        self.wide = nn.Conv2d(6, 8, (1, 3))
        self.out = nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        picture = self.words(ids).unflatten(-1, (4, 6)).movedim(2, 1)
        return self.out(self.wide(self.look(picture)).flatten(2).mean(-1))


def seeing(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Seeing().eval()


IDS = torch.arange(24).reshape(4, 6)
OURS = {
    "oft-embedding": ("words", lambda: OFT(block_size=6)),
    "oft-embedding-series": ("words", lambda: OFT(blocks=4, exact=False, shared=True)),
    "boft-conv": ("look", lambda: BOFT(block_size=4, factors=1)),
    "hra-conv": ("look", lambda: HRA(rank=4)),
    "hra-conv-orthonormal": ("look", lambda: HRA(rank=3, orthonormal=True)),
}
THEIRS = {
    "oft-embedding": ("words", lambda: peft.OFTConfig(target_modules=["words"], oft_block_size=6)),
    "boft-conv": ("look", lambda: peft.BOFTConfig(target_modules=["look"], boft_block_size=6)),
    "hra-conv": ("look", lambda: peft.HRAConfig(target_modules=["look"], r=6)),
}


def stir(parameters: Any) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))


@pytest.mark.parametrize(("layer", "make"), OURS.values(), ids=OURS)
def test_ours_answers_the_same_under_peft(
    layer: str, make: Callable[[], addenda.Method], tmp_path: Path, seeded: int
) -> None:
    model = seeing(seeded)
    before = model(IDS)
    handle = addenda.attach(model, make(), [layer])
    stir(handle.parameters())
    wanted = model(IDS)
    write_peft(handle, tmp_path)
    theirs = peft.PeftModel.from_pretrained(seeing(seeded), tmp_path)
    torch.testing.assert_close(theirs(IDS), wanted, rtol=0, atol=1e-5)
    assert (wanted - before).abs().max() > 1e-2
    again = seeing(seeded)
    import_peft(again, tmp_path)
    torch.testing.assert_close(again(IDS), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("layer", "make"), THEIRS.values(), ids=THEIRS)
def test_theirs_answers_the_same_here(
    layer: str, make: Callable[[], Any], tmp_path: Path, seeded: int
) -> None:
    theirs = peft.get_peft_model(seeing(seeded), make()).eval()
    stir(p for p in theirs.parameters() if p.requires_grad)
    wanted = theirs(IDS)
    theirs.save_pretrained(tmp_path)
    ours = seeing(seeded)
    import_peft(ours, tmp_path)
    torch.testing.assert_close(ours(IDS), wanted, rtol=0, atol=1e-5)
    assert (wanted - seeing(seeded)(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("method", [BOFT(block_size=2, factors=1), HRA(rank=2)])
def test_a_convolution_that_peft_runs_otherwise_is_refused(method: addenda.Method, tmp_path: Path) -> None:
    handle = addenda.attach(seeing(0), method, ["wide"])
    with pytest.raises(
        addenda.errors.ExportError, match="PEFT runs 1 of the convolutions otherwise, first 'wide'"
    ):
        write_peft(handle, tmp_path)


def test_a_convolution_is_refused_where_peft_unfolds_its_input(tmp_path: Path) -> None:
    handle = addenda.attach(seeing(0), OFT(block_size=4), ["look"])
    with pytest.raises(addenda.errors.ExportError, match="first 'look'"):
        write_peft(handle, tmp_path)


@pytest.mark.parametrize(
    "method", [OFT(block_size=4, exact=False, terms=3), PSOFT(rank=2, exact=False, terms=2)]
)
def test_a_series_that_peft_has_not_is_refused(method: addenda.Method, tmp_path: Path) -> None:
    handle = addenda.attach(seeing(0), method, ["out"])
    with pytest.raises(addenda.errors.ExportError, match="PEFT has no series"):
        write_peft(handle, tmp_path)


@pytest.mark.parametrize("method", [FourierFT(coefficients=9), WaveFT(coefficients=9)])
def test_places_that_no_seed_draws_are_refused(method: addenda.Method, tmp_path: Path) -> None:
    handle = addenda.attach(seeing(0), method, ["out"])
    write_peft(handle, tmp_path)
    handle.adapters["out"].places.copy_(torch.arange(9))
    with pytest.raises(addenda.errors.ExportError, match="the places at 'out'"):
        write_peft(handle, tmp_path)


def written(method: addenda.Method, folder: Path, **changes: object) -> Path:
    write_peft(addenda.attach(seeing(0), method, ["out"]), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


SERIES = OFT(block_size=4, exact=False)
BAD = {
    "old-series": (SERIES, {"peft_version": "0.17.1"}, "before 0.18"),
    "no-version": (SERIES, {"peft_version": None}, "before 0.18"),
    "two-terms": (SERIES, {"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms = 2"),
    "psoft-one-term": (
        PSOFT(rank=2, exact=False),
        {"num_cayley_neumann_terms": 1},
        "num_cayley_neumann_terms = 1",
    ),
    "symlet": (WaveFT(coefficients=9), {"wavelet_family": "sym4"}, "got 'sym4'"),
    "road-3": (RoAd(group_size=2), {"variant": "road_3"}, "got 'road_3'"),
    "biases": (HRA(rank=2), {"bias": "hra_only"}, "bias = 'hra_only'"),
}


@pytest.mark.parametrize(("method", "changes", "word"), BAD.values(), ids=BAD)
def test_settings_without_a_counterpart_are_refused_by_name(
    method: addenda.Method, changes: dict[str, object], word: str, tmp_path: Path
) -> None:
    folder = written(method, tmp_path, **changes)
    model = seeing(0)
    with pytest.raises(addenda.errors.AddendaError, match=word):
        import_peft(model, folder)
    assert type(model.out) is nn.Linear


def test_vectors_of_another_shape_are_an_error(tmp_path: Path) -> None:
    folder = written(HRA(rank=2), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    [(key, tensor)] = tensors.items()
    save_file({key: tensor[:-1].contiguous()}, folder / "adapter_model.safetensors")
    with pytest.raises(addenda.errors.CheckpointError, match="has shape"):
        import_peft(seeing(0), folder)
