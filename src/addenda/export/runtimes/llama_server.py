"""The child that holds llama.cpp: ``python -m addenda.export.runtimes.llama_server SETTINGS``, started by `llama_cpp`.

A crash of foreign code is an error there and not the end of the session, its memory goes back when it ends, and what it
prints does not reach the terminal. Writes one JSON line with the address it answers on, and ends with its input.
"""

from __future__ import annotations

import json
import sys

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Serve the files that ``arguments[0]``, a JSON object, names: ``model``, ``adapters``, ``exact``, ``context``,
    ``rows``, ``threads``.
    """
    import xllamacpp as llama

    given = json.loads(arguments[0])
    params = llama.CommonParams()
    params.model.path = given["model"]
    params.n_ctx, params.n_parallel, params.warmup = given["context"], given["rows"], False
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = given["threads"]
    params.lora_adapters = [llama.CommonAdapterLoraInfo(path, 1.0) for path in given["adapters"]]
    params.swa_full = True  # else an answer after a longer text misses what slid out of the window
    params.cache_ram_mib = 0  # it would give back what another slot computed with another adapter
    if given["exact"]:
        # Both are needed: with flash attention the type of the cache has no effect, and without it f16 would round.
        params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)
    sys.stdout.write(json.dumps({"address": server.listening_address}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
