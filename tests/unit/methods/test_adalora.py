"""AdaLoRA's budget and scores against algorithm 1 in float64, and against PEFT's allocator on the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import addenda
from addenda.errors import ConfigError
from addenda.export.peft import import_peft, write_peft
from addenda.methods.adalora import AdaLoRA

SETTINGS = {"rank": 5, "target_rank": 2, "t_init": 3, "t_final": 4, "delta_t": 2, "beta1": 0.8, "beta2": 0.7}
STEPS = 20


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(9, 8), nn.Linear(8, 11), nn.Linear(11, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


PATHS = ("first", "second", "third")


def attached(**settings: object) -> addenda.Handle:
    handle = addenda.attach(Layers().double(), AdaLoRA(**{**SETTINGS, **settings}), targets=list(PATHS))
    for adapter in handle.adapters.values():
        nn.init.normal_(adapter.values)
    return handle


def with_random_gradients(handle: addenda.Handle) -> None:
    for parameter in handle.parameters():
        parameter.grad = torch.randn_like(parameter)


class Algorithm1:
    """The paper's scores (equations 8 to 11) and budget (12, as its code has it), one number at a time."""

    def __init__(self, handle: addenda.Handle) -> None:
        self.mean = {name: torch.zeros_like(p) for name, p in handle.named_parameters()}
        self.change = {name: torch.zeros_like(p) for name, p in handle.named_parameters()}

    def observe(self, parameters: dict[str, nn.Parameter]) -> None:
        b1, b2 = SETTINGS["beta1"], SETTINGS["beta2"]
        for name, p in parameters.items():
            now = (p.detach() * p.grad).abs()
            self.mean[name] = b1 * self.mean[name] + (1 - b1) * now
            self.change[name] = b2 * self.change[name] + (1 - b2) * (now - self.mean[name]).abs()

    def score(self, path: str, i: int) -> float:
        s = {n: self.mean[f"{path}.{n}"] * self.change[f"{path}.{n}"] for n in ("P", "values", "Q")}
        return float(s["values"][i] + s["P"][:, i].sum() / len(s["P"]) + s["Q"][i].sum() / len(s["Q"][i]))

    def kept(self, budget: int) -> set[tuple[str, int]]:
        ranked = sorted(((self.score(p, i), p, i) for p in PATHS for i in range(5)), reverse=True)
        return {(p, i) for _, p, i in ranked[:budget]}


def test_what_is_left_after_each_step_is_what_algorithm_1_leaves() -> None:
    handle = attached()
    reference = Algorithm1(handle)
    left, last = [], set()
    for step in range(1, STEPS + 1):
        with_random_gradients(handle)
        if step < 16:
            reference.observe(dict(handle.named_parameters()))
        before = {path: adapter.values.detach().clone() for path, adapter in handle.adapters.items()}
        handle.after_update(step=step, of_steps=STEPS)
        masks = step == 16 or (3 < step < 16 and step % 2 == 0)
        if masks:
            last = reference.kept(int((15 - 6) * (1 - (step - 3) / 13) ** 3 + 6))
        for path, adapter in handle.adapters.items():
            gone = (
                torch.tensor([(path, i) not in last for i in range(5)])
                if masks or step > 16
                else torch.zeros(5).bool()
            )
            torch.testing.assert_close(adapter.values.detach(), before[path].masked_fill(gone, 0.0))
            nn.init.normal_(adapter.values)  # an optimizer moves all of them again
        left.append(len(last))
    assert left[3:16:2] == sorted(left[3:16:2], reverse=True)
    assert len(last) == 6
    handle.after_update(step=STEPS, of_steps=STEPS)
    assert sum(int((adapter.values != 0).sum()) for adapter in handle.adapters.values()) == 6


def test_each_step_is_that_of_pefts_allocator() -> None:
    peft = pytest.importorskip("peft")
    ours = attached()
    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, tinit=3, tfinal=4, deltaT=2, beta1=0.8, beta2=0.7, total_step=STEPS,
        target_modules=list(PATHS),
    )  # fmt: skip
    theirs = peft.get_peft_model(Layers().double(), config)
    for step in range(1, STEPS + 1):
        with_random_gradients(ours)
        for path, adapter in ours.adapters.items():
            nn.init.normal_(adapter.values)
            layer = theirs.base_model.model.get_submodule(path)
            pairs = {"lora_A": adapter.Q, "lora_B": adapter.P, "lora_E": adapter.values[:, None]}
            for name, value in pairs.items():
                parameter = getattr(layer, name)["default"]
                parameter.data = value.detach().clone()
                grad = adapter.values.grad[:, None] if name == "lora_E" else value.grad
                parameter.grad = grad.clone()
        ours.after_update(step=step, of_steps=STEPS)
        theirs.base_model.update_and_allocate(step)
        for path, adapter in ours.adapters.items():
            expected = theirs.base_model.model.get_submodule(path).lora_E["default"][:, 0]
            torch.testing.assert_close(adapter.values, expected, msg=f"step {step}, {path}")


def test_the_penalty_is_zero_for_orthonormal_vectors_and_pefts_for_others() -> None:
    handle = attached(orthogonality=0.3)
    wanted = []
    for adapter in handle.adapters.values():
        wanted += [
            torch.linalg.norm(m - torch.eye(5)) for m in (adapter.P.T @ adapter.P, adapter.Q @ adapter.Q.T)
        ]
    torch.testing.assert_close(handle.penalty(), 0.3 * sum(wanted) / 6)
    for adapter in handle.adapters.values():
        nn.init.orthogonal_(adapter.P)
        nn.init.orthogonal_(adapter.Q)
    assert float(handle.penalty().detach()) < 1e-6


def test_a_saved_adapter_holds_nothing_of_the_training(tmp_path: Path) -> None:
    handle = attached()
    with_random_gradients(handle)
    handle.after_update(step=STEPS - 4, of_steps=STEPS)
    addenda.save(handle.model, tmp_path / "adapter")
    names = {name.rpartition(".")[2] for name in handle.tensors(training=False)}
    assert names == {"P", "values", "Q", "pruned"}
    assert {name.rpartition(".")[2] for name in handle.tensors()} > names
    x, model = torch.randn(3, 9).double(), handle.model
    expected = model(x)
    handle.detach()
    addenda.load(model, tmp_path / "adapter")
    assert torch.equal(model(x), expected)


# PEFT looks for layers by the names that it gives their values itself, and takes what has no entry left for damaged.
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*have invalid shape:UserWarning")
@pytest.mark.parametrize("emptied", [(), ("second",)])
def test_what_is_left_goes_to_peft_and_comes_back(tmp_path: Path, emptied: tuple[str, ...]) -> None:
    peft = pytest.importorskip("peft")
    handle = attached()
    base = {name: p.float() for name, p in handle.model.state_dict().items() if "adapters" not in name}
    handle.model.float()
    for step in range(1, 17):
        with_random_gradients(handle)
        handle.after_update(step=step, of_steps=STEPS)
    for path in emptied:
        nn.init.zeros_(handle.adapters[path].values)
        nn.init.ones_(handle.adapters[path].pruned)
    left = {path: int((adapter.pruned == 0).sum()) for path, adapter in handle.adapters.items()}
    x = torch.randn(3, 9)
    wanted = handle.model(x)
    write_peft(handle, tmp_path)
    twins = [Layers(), Layers()]
    for twin in twins:
        twin.load_state_dict(base)
    torch.testing.assert_close(
        peft.PeftModel.from_pretrained(twins[0], tmp_path)(x), wanted, rtol=1e-5, atol=1e-5
    )
    again = import_peft(twins[1], tmp_path)
    torch.testing.assert_close(twins[1](x), wanted, rtol=1e-5, atol=1e-5)
    assert {path: len(adapter.values) for path, adapter in again.adapters.items()} == left
    assert sum(left.values()) == 6 or emptied


def test_a_run_too_short_to_prune_in_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave none of 7 steps"):
        attached().after_update(step=1, of_steps=7)
