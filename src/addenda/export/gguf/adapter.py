"""llama.cpp's adapter file: the two factors of each layer's change, under the names of the base's GGUF tensors.

Layout (llama.cpp, llama-adapter.cpp): ``general.type`` is ``adapter``, ``adapter.type`` is ``lora``; for each tensor
``<name>.lora_a`` (rank, d_in) and ``<name>.lora_b`` (d_out, rank), and for the token embedding ``lora_a`` the other way
round. The runtime scales their product by ``adapter.lora.alpha`` over the rank, one alpha for all. Rows of ``lora_b``
lie as those of the base's tensor do, which for queries and keys of Llama is another order than in the model; a file
that gets this wrong loads without an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from torch import Tensor

from addenda.bases.gguf_header import read_header
from addenda.core.handle import Handle
from addenda.core.whole import WholeAdapter
from addenda.errors import CheckpointError, ExportError
from addenda.export.gguf.copying import read_tensor, unpack
from addenda.export.gguf.origin import Origin

__all__ = ["ALPHA", "BASE_NAME", "EMBEDDING", "Factors", "factors_of", "read_adapter", "write_adapter"]

ALPHA = "adapter.lora.alpha"
BASE_NAME = "general.base_model.0.name"
EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Factors:
    """scaling B A is added to a weight."""

    A: Tensor
    """(rank, d_in) float32."""
    B: Tensor
    """(d_out, rank) float32; rows in the model's order."""
    scaling: float

    @property
    def alpha(self) -> float:
        """The scaling times the rank, as a file holds it."""
        return float(np.float32(self.scaling * len(self.A)))

    def delta(self) -> Tensor:
        """Return scaling B A, (d_out, d_in)."""
        return self.scaling * (self.B @ self.A)


def factors_of(handle: Handle) -> dict[str, Factors]:
    """Return the factors of an adapter on each layer, by path.

    Raises:
        ExportError: on some layer it is not a change of low rank alone.
    """
    found, other = {}, []
    for path, adapter in handle.adapters.items():
        term = None if isinstance(adapter, WholeAdapter) else adapter.eval().low_rank_term()
        if term is None:
            other.append(path)
            continue
        A, B, scaling = term
        found[path] = Factors(A.detach().float().cpu(), B.detach().float().cpu(), float(scaling))
    if other:
        raise ExportError(
            f"a GGUF adapter holds changes of low rank alone, and on {len(other)} layers this one is another",
            where={"first": other[0], "method": handle.method.name},
            hint="'--to gguf' merges it into the base, if its method can be merged",
        )
    return found


def write_adapter(handle: Handle, origin: Origin, target: Path, *, base_name: str = "") -> None:
    """Write an adapter for the base that ``origin`` is.

    Args:
        handle: of a method whose change has low rank.
        origin: the base's GGUF file.
        target: the new file.
        base_name: what the base can be loaded by.

    Raises:
        ExportError: a layer has no tensor there, or no such change.
    """
    factors = factors_of(handle)
    alpha = Counter(each.alpha for each in factors.values()).most_common(1)[0][0]
    writer = gguf.GGUFWriter(target, origin.header.architecture)
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32(ALPHA, alpha)
        if base_name:
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base_name)
        for path, each in factors.items():
            way = origin.way(path)
            # One alpha for the file: what a layer's differs by goes into its B.
            B = each.B if each.alpha == alpha else each.B * (each.alpha / alpha)
            A = each.A.t() if way.tensor == EMBEDDING else each.A
            if way.tensor != EMBEDDING:
                B = way.back(B)
            writer.add_tensor(f"{way.tensor}.lora_a", A.contiguous().numpy())
            writer.add_tensor(f"{way.tensor}.lora_b", B.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_adapter(file: Path, origin: Origin) -> dict[str, Factors]:
    """Read an adapter file back; by the model's layers.

    Raises:
        CheckpointError: it is no LoRA adapter, is for another architecture, or does not fit the base.
    """
    header = read_header(file)
    meta = header.metadata
    told = {key: meta.get(key) for key in ("general.type", "adapter.type", "general.architecture")}
    wanted = {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": origin.header.architecture,
    }
    if told != wanted:
        wrong = [key for key in wanted if told[key] != wanted[key]]
        raise CheckpointError(
            f"not a LoRA adapter for this base: its {wrong[0]} is {told[wrong[0]]!r}, not {wanted[wrong[0]]!r}",
            where={"file": file},
            hint="take the adapter that was made for this base, as convert_lora_to_gguf or addenda export writes it",
        )
    with file.open("rb") as opened:
        tensors = {each.name: unpack(read_tensor(opened, each), each.type) for each in header.tensors}
    return _paired(tensors, meta.get(ALPHA), origin, file)


def _paired(
    tensors: Mapping[str, Tensor], alpha: float | None, origin: Origin, file: Path
) -> dict[str, Factors]:
    found, problems = {}, []
    names = sorted({name.rpartition(".lora_")[0] for name in tensors})
    for name in names:
        A, B = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        parameter = origin.parameters.get(name)
        if A is None or B is None:
            problems.append(f"'{name}' has one factor only")
        elif parameter is None:
            problems.append(f"the base has no tensor '{name}'")
        else:
            A = A.t() if name == EMBEDDING else A
            shape = origin.tensors[name].shape
            if name == EMBEDDING:
                shape = shape[::-1]
            if (B.shape[0], A.shape[1]) != shape or A.shape[0] != B.shape[1]:
                problems.append(
                    f"factors of '{name}' are {tuple(A.shape)} and {tuple(B.shape)} at a weight of {shape}"
                )
                continue
            rank = len(A)
            rows = B if name == EMBEDDING else origin.ways[parameter].there(B)
            path = parameter.removesuffix(".weight")
            # Without an alpha the runtime does not scale at all.
            found[path] = Factors(A.contiguous(), rows.contiguous(), alpha / rank if alpha else 1.0)
    if problems:
        raise CheckpointError(
            f"the adapter does not fit the base: {'; '.join(problems[:3])}",
            where={"file": file, "problems": len(problems)},
            hint="take the adapter that was made for this base",
        )
    return found
