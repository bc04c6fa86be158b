"""How far two right programs may be apart: asked of the model itself, whose sums are disturbed in their last bits.

Two programs that compute the same in float32 add up in another order. Most answers do not notice. Where a model hangs
on a small difference of large numbers, as after training at a high rate, one position in a hundred can move by a
thousand times as much as the others, in PyTorch against its own float64 as in any other program.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["with_last_bits_disturbed"]


@contextmanager
def with_last_bits_disturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Multiply for a while what each module with weights gives by one and a normal draw of its dtype's epsilon.

    Args:
        model: any module.
        seed: of the draws.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def disturb(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        at = output.device
        generator = generators.setdefault(at, torch.Generator(at).manual_seed(seed))
        drawn = torch.randn(output.shape, generator=generator, device=at, dtype=torch.float32)
        return output * (1 + torch.finfo(output.dtype).eps * drawn).to(output.dtype)

    with ExitStack() as hooks:
        for module in model.modules():
            if module._parameters or module._buffers:
                hooks.callback(module.register_forward_hook(disturb).remove)
        yield
