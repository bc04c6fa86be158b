from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from addenda.train.loss import evaluate_positions, packed_loss

TOKENS, WIDTH, VOCAB, TARGETS = 40, 12, 50, 23


class LinearHead(nn.Module):
    """An output head with a soft cap; counts the largest number of rows it was given at once."""

    def __init__(self, dtype=torch.float64, *, learns=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCAB, WIDTH, dtype=dtype), requires_grad=learns)
        self.largest = 0

    def logits(self, hidden):
        self.largest = max(self.largest, len(hidden))
        return torch.tanh(hidden @ self.weight.t() / 5) * 5


def problem(dtype=torch.float64):
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    return hidden, torch.randperm(TOKENS)[:TARGETS], torch.randint(0, VOCAB, (TARGETS,))


def reference(head, hidden, predict_from, targets, denominator):
    return F.cross_entropy(head.logits(hidden[predict_from]), targets, reduction="sum") / denominator


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, TARGETS, 1000])
def test_loss_and_gradients_equal_cross_entropy(chunk, learns):
    head = LinearHead(learns=learns)
    hidden, where, targets = problem()
    over = [hidden, head.weight] if learns else [hidden]
    ours = packed_loss(head, hidden, where, targets, denominator=17.0, chunk=chunk)
    theirs = reference(head, hidden, where, targets, 17.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(ours * 3, over), torch.autograd.grad(theirs * 3, over), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_bfloat16_is_as_near_to_the_truth_as_cross_entropy_in_bfloat16():
    head = LinearHead(torch.bfloat16)
    hidden, where, targets = problem(torch.bfloat16)
    exact_head = LinearHead()
    exact_head.weight.data.copy_(head.weight)
    exact = hidden.detach().double().requires_grad_()
    truth_loss = reference(exact_head, exact, where, targets, 5.0)
    (truth,) = torch.autograd.grad(truth_loss, exact)
    ours_loss = packed_loss(head, hidden, where, targets, denominator=5.0)
    (ours,) = torch.autograd.grad(ours_loss, hidden)
    (naive,) = torch.autograd.grad(reference(head, hidden, where, targets, 5.0), hidden)
    assert ours_loss.dtype == torch.float32
    assert abs(ours_loss - truth_loss) <= 2e-3 * truth_loss
    assert (ours - truth).norm() <= 1.25 * (naive - truth).norm()


def test_rows_of_one_global_batch_add_up_to_its_mean_whatever_their_sizes():
    head = LinearHead()
    hidden, where, targets = problem()
    whole = packed_loss(head, hidden, where, targets, denominator=TARGETS)
    parts = sum(
        packed_loss(head, hidden, w, t, denominator=TARGETS)
        for w, t in zip(where.split([3, 19, 1]), targets.split([3, 19, 1]), strict=True)
    )
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=0)
    (a,) = torch.autograd.grad(whole, hidden)
    (b,) = torch.autograd.grad(parts, hidden)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_never_more_rows_than_a_chunk_are_scored_at_once():
    head = LinearHead()
    hidden, where, targets = problem()
    packed_loss(head, hidden, where, targets, denominator=1.0, chunk=6).backward()
    evaluate_positions(head, hidden, where, targets, chunk=6)
    assert head.largest == 6


def test_a_learning_head_keeps_no_scores_between_forward_and_backward():
    saved = []
    head = LinearHead(learns=True)
    hidden, where, targets = problem()

    def note(x):
        saved.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        packed_loss(head, hidden, where, targets, denominator=1.0, chunk=6)
    assert saved
    assert not any(shape[-1] == VOCAB and 0 < shape[0] <= 6 for shape in saved if len(shape) == 2)


@pytest.mark.parametrize("learns", [False, True])
def test_not_a_number_comes_through(learns):
    head = LinearHead(learns=learns)
    hidden, where, targets = problem()
    with torch.no_grad():
        hidden[where[4], 2] = torch.nan
    loss = packed_loss(head, hidden, where, targets, denominator=1.0, chunk=5)
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient[where[4]].isnan().all()
    assert gradient[where[5]].isfinite().all()
    assert evaluate_positions(head, hidden, where, targets).nll.isnan().nonzero().tolist() == [[4]]


def test_evaluation_equals_cross_entropy_and_argmax_per_target():
    head = LinearHead()
    hidden, where, targets = problem()
    scores = head.logits(hidden[where])
    targets[::2] = scores[::2].argmax(1)
    result = evaluate_positions(head, hidden, where, targets, chunk=5)
    torch.testing.assert_close(
        result.nll, F.cross_entropy(scores, targets, reduction="none"), rtol=1e-12, atol=1e-13
    )
    assert torch.equal(result.correct, scores.argmax(1) == targets)
    assert result.correct_count >= TARGETS // 2
    assert result.nll_sum == pytest.approx(float(result.nll.sum()))
    assert not result.nll.requires_grad


def test_evaluation_of_no_targets_is_empty():
    none = torch.tensor([], dtype=torch.long)
    result = evaluate_positions(LinearHead(), problem()[0], none, none)
    assert (result.nll_sum, result.correct_count) == (0.0, 0)


def test_very_sure_scores_give_no_infinity():
    class Identity:
        def logits(self, hidden):
            return hidden

    hidden = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    loss = packed_loss(Identity(), hidden, torch.tensor([0]), torch.tensor([2]), denominator=1.0)
    assert loss.item() == 2e4
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert gradient.tolist() == [[1.0, 0.0, -1.0]]


def test_one_chunk_of_scores_exists_at_a_time():
    class Watching:
        def __init__(self):
            self.weight, self.made = torch.randn(8, 50), []

        def logits(self, hidden):
            assert all(earlier() is None for earlier in self.made)
            scores = hidden @ self.weight
            if len(hidden):
                self.made.append(weakref.ref(scores))
            return scores

    head, hidden = Watching(), torch.randn(40, 8, requires_grad=True)
    at, targets = torch.arange(30), torch.randint(0, 50, (30,))
    packed_loss(head, hidden, at, targets, denominator=30, chunk=4).backward()
    assert len(head.made) == 8
