from __future__ import annotations

import pytest
import torch

from addenda.errors import ConfigError
from addenda.train import precision
from addenda.train.precision import choose_device, choose_precision


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_wish_is_granted(name):
    chosen = choose_precision(name)
    assert (chosen.dtype, chosen.reason, chosen.name) == (getattr(torch, name), "as asked", name)


def test_an_unknown_wish_is_refused():
    with pytest.raises(ConfigError, match="unknown precision 'half'"):
        choose_precision("half")


def test_a_processor_that_says_it_multiplies_bfloat16_gets_it(monkeypatch):
    monkeypatch.setattr(precision, "_bfloat16_flags", lambda: ["avx512_bf16"])
    chosen = choose_precision()
    assert chosen.dtype == torch.bfloat16
    assert "avx512_bf16" in chosen.reason


@pytest.mark.parametrize(("narrow", "dtype"), [(0.9, torch.bfloat16), (4.0, torch.float32)])
def test_a_processor_that_says_nothing_is_timed(monkeypatch, narrow, dtype):
    monkeypatch.setattr(precision, "_bfloat16_flags", list)
    seconds = {torch.float32: 1.0, torch.bfloat16: narrow}
    monkeypatch.setattr(precision, "_seconds_per_product", lambda dtype, device: seconds[dtype])
    chosen = choose_precision()
    assert chosen.dtype == dtype
    assert f"{narrow:.1f} times" in chosen.reason


def test_a_product_takes_time():
    assert precision._seconds_per_product(torch.float32, "cpu") > 0


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_is_taken_where_there_is_one_and_a_wish_is_granted(two_gpus):
    assert choose_device().device == torch.device("cuda")
    assert "Some GPU" in choose_device().reason
    assert [choose_device(wish).device for wish in ("cpu", "cuda:1")] == [
        torch.device("cpu"),
        torch.device("cuda:1"),
    ]


def test_without_a_gpu_the_cpu_is_taken(no_gpu):
    assert choose_device().device == torch.device("cpu")
    assert "no GPU" in choose_device().reason


@pytest.mark.parametrize("wish", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there_is_refused(no_gpu, wish):
    with pytest.raises(ConfigError, match=f"no '{wish}'") as caught:
        choose_device(wish)
    assert caught.value.where["devices"] == "cpu"
    assert "base.device=auto" in caught.value.hint


def test_a_number_beyond_the_last_gpu_is_refused_with_those_that_exist(two_gpus):
    with pytest.raises(ConfigError) as caught:
        choose_device("cuda:2")
    assert caught.value.where["devices"] == "cpu cuda:0 cuda:1"
