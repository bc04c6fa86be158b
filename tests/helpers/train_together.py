"""One of several processes that train the tiny model of ``train_tiny`` together; each writes down what it saw."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import train_tiny as tiny
from torch import nn
from torch.distributed.tensor import DTensor

import addenda
from addenda.bases import formats
from addenda.bases.packed_layers import PackedLinear
from addenda.core import registry
from addenda.errors import AddendaError
from addenda.train import loop
from addenda.train.config import TrainConfig
from addenda.train.interrupt import Interrupted
from addenda.train.metrics import MetricsLog
from addenda.train.parallel import Parallel, processes
from addenda.train.session import Session
from addenda.train.state import digest_of_tensors


def small(name):
    """A method with the first settings under which the conformance suite tries it."""
    return registry.get(name).from_settings(registry.get(name).variants[0])


def join_group(rank, size, port):
    """Set what torchrun would set."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)


def process(rank, size, port, folder, *, resume=False, seed=0, config=None, failpoints="", seconds_per_step=0.0,
            other_rows=False, method=None, four_bits=None, blocks_run_again=None):  # fmt: skip
    """Train, then write ``process-<rank>.json``; the exit code is the command line's."""
    join_group(rank, size, port)
    os.environ["ADDENDA_FAILPOINTS"] = failpoints
    base = (
        in_four_bits(tiny.make_base(seed, intermediate_size=128), four_bits)
        if four_bits
        else tiny.make_base(seed)
    )
    codes = nn.Parameter(torch.arange(5 * 7, dtype=torch.uint8).view(5, 7), requires_grad=False)
    base.model.model.layers[0].mlp.register_parameter(
        "codes", codes
    )  # as a packed weight format would hold it
    before = digest_of_tensors(base.model.state_dict())
    handle = addenda.attach(base.model, small(method), seed=3) if method else tiny.attach(base)
    saw = {"micro_batches": [], "held": []}
    watch(base.model, saw)
    if blocks_run_again is not None:
        Session.recompute = lambda self, tokens: blocks_run_again
    log = MetricsLog(Path(folder) / "metrics.jsonl")

    def tell(event):
        log(event)
        time.sleep(seconds_per_step)

    try:
        result = loop.train(
            base, handle, tiny.make_rows(22, seed + (7 if other_rows else 1)), tiny.make_rows(6, seed + 2),
            TrainConfig(**{**tiny.CONFIG, **(config or {})}), run_dir=folder, on_event=tell, resume=resume,
        )  # fmt: skip
        saw |= {"steps": result.steps, "evaluations": [e["metrics"]["nll_per_token"] for e in result.history]}
        saw |= {"adapter": tiny.digest(handle)}
        handle.detach()
        saw |= {"base_is_as_before": digest_of_tensors(base.model.state_dict()) == before}
        saw |= {"codes_is_the_same_parameter": base.model.model.layers[0].mlp.codes is codes}
    except (AddendaError, Interrupted) as error:
        saw["error"] = f"{type(error).__name__}: {error}"
        sys.exit(error.exit_code)
    finally:
        Path(folder, f"process-{rank}.json").write_text(json.dumps(saw))


def in_four_bits(base, whose):
    """Quantise the linear layers of the blocks, as bitsandbytes does or as this package does."""
    blocks = base.model.model.layers
    for path, layer in [(p, m) for p, m in blocks.named_modules() if isinstance(m, nn.Linear)]:
        if whose == "ours":
            raw = formats.get("NF4").quantize(layer.weight)
            packed = PackedLinear(raw, formats.get("NF4"), layer.in_features)
        else:
            import bitsandbytes

            packed = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                quant_type="nf4",
                compute_dtype=torch.float32,
            )
            packed.load_state_dict(layer.state_dict())
        blocks.set_submodule(path, packed)
    base.model.to("cpu")  # bitsandbytes quantises here
    return base


def watch(model, saw):
    """Note the rows of every micro-batch that is trained on, and the numbers of the blocks that this process holds."""
    packed_batch = loop.packed_batch

    def noted(examples, device):
        saw["micro_batches"].append([example.row.index for example in examples])
        layers = model.model.layers
        named = (*layers.named_parameters(), *layers.named_buffers())
        weights = [tensor for name, tensor in named if ".adapters." not in name]
        saw["held"].append(sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in weights))
        return packed_batch(examples, device)

    loop.packed_batch = noted


def exchange(rank, size, port, seed):
    """Every message that processes send each other, against what it must give."""
    join_group(rank, size, port)
    draws = [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed + r)) for r in range(size)]
    with processes() as parallel, processes() as again:
        assert again == parallel == Parallel(rank, size, size)
        assert parallel.total(0.5, float(rank)) == [0.5 * size, sum(range(size))]
        assert parallel.most(rank, -rank) == [size - 1, 0]
        assert parallel.least(rank, -rank) == [0, 1 - size]
        assert parallel.agree({"from": [rank, 0.1]}) == {"from": [0, 0.1]}
        assert torch.equal(parallel.share({"x": draws[rank]})["x"], draws[0])
        everywhere, lonely, nowhere = (nn.Parameter(torch.zeros(3, 2)) for _ in range(3))
        everywhere.grad = draws[rank].clone()
        lonely.grad = draws[1].clone() if rank == 1 else None
        parallel.add_gradients([everywhere, lonely, nowhere])
        torch.testing.assert_close(everywhere.grad, sum(draws))
        assert torch.equal(lonely.grad, draws[1])
        assert nowhere.grad is None
        sums = [draws[rank].clone(), torch.full((2,), float(rank))]
        parallel.add(sums)
        torch.testing.assert_close(sums, [sum(draws), torch.full((2,), float(sum(range(size))))])
