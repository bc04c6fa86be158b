"""The gate can fail: on a wrong logit, on another top token, on NaN."""

from __future__ import annotations

import pytest
import torch

from addenda.errors import ExportError
from addenda.export.parity import TOLERANCE, UNCHANGED, require_parity


def test_equal_logits_pass_with_their_figures() -> None:
    logits = [torch.randn(7, 32), torch.randn(3, 32)]
    parity = require_parity(logits, [row.clone() for row in logits], reader="a test")
    assert (parity.max_abs_logit_difference, parity.top1_agreement, parity.positions) == (0.0, 1.0, 10)
    assert "a test" in str(parity)


def test_the_limit_is_a_share_of_the_largest_logit() -> None:
    logits = torch.randn(50, 32)
    logits[0, 0] = 40.0
    limit = 40.0 * UNCHANGED
    near, far = logits.clone(), logits.clone()
    near[1, 1] += 0.5 * limit
    far[1, 1] += 2.0 * limit
    assert require_parity([logits], [near], reader="a test").tolerance == pytest.approx(limit)
    with pytest.raises(ExportError, match="does not answer as the trained model does"):
        require_parity([logits], [far], reader="a test")
    assert require_parity([logits], [far], reader="a test", dtype="bfloat16").positions == 50


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_merged_weights_may_differ_by_what_their_rounding_makes_and_no_more(dtype: str) -> None:
    logits = torch.randn(50, 32)
    logits[:, 0] = 40.0  # the same top token everywhere, whatever happens to another
    near, far = logits.clone(), logits.clone()
    near[1, 1] += 0.9 * 40.0 * TOLERANCE[dtype]
    far[1, 1] += 1.1 * 40.0 * TOLERANCE[dtype]
    assert require_parity([logits], [near], reader="a test", dtype=dtype).dtype == dtype
    with pytest.raises(ExportError, match="does not answer as the trained model does"):
        require_parity([logits], [far], reader="a test", dtype=dtype)


def test_other_top_tokens_fail_even_where_logits_are_close() -> None:
    logits = torch.zeros(10, 4)
    logits[:, 0] = 1.0
    logits[:, 1] = 1.0 - 1e-6
    found = logits.clone()
    found[:, 1] = 1.0 + 1e-6
    with pytest.raises(ExportError) as caught:
        require_parity([logits], [found], reader="a test")
    assert caught.value.where["same top token"] == "0.0% of 10 positions"


def test_not_a_number_fails() -> None:
    logits = torch.randn(5, 8)
    found = logits.clone()
    found[2, 3] = float("nan")
    with pytest.raises(ExportError):
        require_parity([logits], [found], reader="a test")
