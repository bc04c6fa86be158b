from __future__ import annotations

import pytest
import torch

from addenda.errors import ConfigError
from addenda.train import precision
from addenda.train.precision import choose_precision


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
