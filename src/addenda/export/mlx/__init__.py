"""mlx-lm's adapter folder, written and read, and what its model folders need; the only room that knows its names.

Layout (mlx-lm 0.32): ``adapter_config.json`` with one rank and one scale for all layers, and ``adapters.safetensors``
with ``<layer path>.lora_a`` (d_in, rank) and ``<layer path>.lora_b`` (rank, d_out), of which a layer adds
``scale * (x @ lora_a) @ lora_b``.
"""

from __future__ import annotations

from addenda.export.mlx.config import with_rope
from addenda.export.mlx.folder import CONFIG, TENSORS, adapter_audit, write_adapter
from addenda.export.mlx.reading import import_mlx, is_mlx

__all__ = ["CONFIG", "TENSORS", "adapter_audit", "import_mlx", "is_mlx", "with_rope", "write_adapter"]
