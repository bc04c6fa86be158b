"""Adapt a small convolutional network, look at what it costs, fold it in, and take it off again.

Run: python examples/01_any_module.py
"""

from __future__ import annotations

import torch
from torch import nn

import addenda

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1),
    nn.Flatten(),
    nn.Linear(16 * 64, 4),
)
images, labels = torch.randn(64, 1, 8, 8), torch.randint(4, (64,))
before = model(images)

# The plan is free: nothing is changed yet.
print(addenda.plan(model, addenda.LoRA(rank=4), targets=["2", "4"]))

# The probe batch proves that each adapter is called and gets a gradient.
handle = addenda.attach(model, addenda.LoRA(rank=4), targets=["2", "4"], probe=images[:2])
print(handle)

optimizer = torch.optim.AdamW(handle.parameters(), lr=1e-2)
for step in range(60):
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:2d}: loss {loss.item():.3f}")

with handle.disabled():
    print("disabled, it is the base:", torch.equal(model(images), before))
adapted = model(images)
handle.merge()
print(f"merged, largest difference: {(model(images) - adapted).abs().max().item():.1e}")
handle.unmerge()
handle.detach()
print("detached, it is the base:", torch.equal(model(images), before))
