"""llama.cpp's adapter file: the two factors of each layer's change, under the names of the base's GGUF tensors.

Layout (llama.cpp, llama-adapter.cpp): ``general.type`` is ``adapter``, ``adapter.type`` is ``lora``; for each tensor
``<name>.lora_a`` (rank, d_in) and ``<name>.lora_b`` (d_out, rank), and for the token embedding ``lora_a`` the other way
round. The runtime scales their product by ``adapter.lora.alpha`` over the rank, one alpha for all. Rows of ``lora_b``
lie as those of the base's tensor do, which for queries and keys of Llama is another order than in the model; a file
that gets this wrong loads without an error. Of a tensor that stacks the weights of experts, both factors are stacked
likewise: (experts, rank, d_in) and (experts, d_out, rank).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
from torch import Tensor

from addenda.bases.gguf_header import read_header
from addenda.core.handle import Handle
from addenda.errors import CheckpointError
from addenda.export.gguf.copying import read_tensor, unpack
from addenda.export.gguf.factors import Factors, StackedFactors, apart, factors_of, stacked
from addenda.export.gguf.origin import Origin

__all__ = ["ALPHA", "BASE_NAME", "EMBEDDING", "read_adapter", "write_adapter"]

ALPHA = "adapter.lora.alpha"
BASE_NAME = "general.base_model.0.name"
EMBEDDING = "token_embd.weight"


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
            if path in origin.experts:
                continue
            way = origin.way(path)
            # One alpha for the file: what a layer's differs by goes into its B.
            B = each.B if each.alpha == alpha else each.B * (each.alpha / alpha)
            A = each.A.t() if way.tensor == EMBEDDING else each.A
            if way.tensor != EMBEDDING:
                B = way.back(B)
            writer.add_tensor(f"{way.tensor}.lora_a", A.contiguous().numpy())
            writer.add_tensor(f"{way.tensor}.lora_b", B.contiguous().numpy())
        for name, stack in origin.stacks.items():
            whole = stacked([factors.get(path) for path in origin.paths(stack)], stack.rows, alpha)
            if whole is not None:
                writer.add_tensor(f"{name}.lora_a", whole.A.numpy())
                writer.add_tensor(f"{name}.lora_b", whole.B.numpy())
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
        tensors = {
            each.name: unpack(read_tensor(opened, each), each.type).reshape(each.shape)
            for each in header.tensors
        }
    return _paired(tensors, meta.get(ALPHA), origin, file)


def _paired(
    tensors: Mapping[str, Tensor], alpha: float | None, origin: Origin, file: Path
) -> dict[str, Factors]:
    found: dict[str, Factors] = {}
    stacks: dict[str, list[StackedFactors]] = {}
    problems = []
    for name in sorted({name.rpartition(".lora_")[0] for name in tensors}):
        A, B = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if A is None or B is None:
            problems.append(f"'{name}' has one factor only")
            continue
        if problem := _misfit(name, A, B, origin):
            problems.append(problem)
            continue
        # Without an alpha the runtime does not scale at all.
        scaling = alpha / B.shape[-1] if alpha else 1.0
        if stack := origin.stacks.get(name):
            stacks.setdefault(stack.parameter, []).append(StackedFactors(A, B, stack.rows, scaling))
            continue
        parameter = origin.parameters[name]
        A, B = (A.t(), B) if name == EMBEDDING else (A, origin.ways[parameter].there(B))
        found[parameter.removesuffix(".weight")] = Factors(A.contiguous(), B.contiguous(), scaling)
    if problems:
        raise CheckpointError(
            f"the adapter does not fit the base: {'; '.join(problems[:3])}",
            where={"file": file, "problems": len(problems)},
            hint="take the adapter that was made for this base",
        )
    return {**found, **_of_experts(stacks, origin)}


def _misfit(name: str, A: Tensor, B: Tensor, origin: Origin) -> str:
    """Why two factors are not of this tensor, or ""."""
    if name not in origin.parameters and name not in origin.stacks:
        return f"the base has no tensor '{name}'"
    shape = origin.tensors[name].shape
    shape = (1, *shape) if len(shape) == 1 else shape
    given = tuple(A.shape), tuple(B.shape)
    if name == EMBEDDING:
        A, shape = A.mT, shape[::-1]
    *experts, d_out, d_in = shape
    rank = B.shape[-1]
    if tuple(A.shape) == (*experts, rank, d_in) and tuple(B.shape) == (*experts, d_out, rank):
        return ""
    return f"factors of '{name}' are {given[0]} and {given[1]} at a weight of {shape}"


def _of_experts(found: Mapping[str, list[StackedFactors]], origin: Origin) -> dict[str, Factors]:
    made = {}
    for parameter, stacks in found.items():
        own = [stack for stack in origin.stacks.values() if stack.parameter == parameter]
        d_out = max(stack.rows.stop for stack in own)
        for path, factors in zip(origin.paths(own[0]), apart(stacks, d_out), strict=True):
            if factors is not None:
                made[path] = factors
    return made
