"""Every export of one trained adapter, each through the gate: what it costs, what it keeps, in the program it is for.

    python benchmarks/exports/run.py RUN [--calibrate DATA] [--only gguf-lora gguf:q4_0 ...] [--out FILE]

RUN is a run folder or an adapter, such as `addenda train examples/data/support.jsonl` leaves. One JSON line an export.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from addenda.bases.place import in_float32
from addenda.errors import AddendaError
from addenda.export.run import export_adapter
from addenda.recipe import load_adapted
from addenda.recipe.calibrating import calibration_rows

FORMS = (
    "peft", "merged:float32", "merged:bfloat16", "merged:base", "merged:careful", "gguf-lora", "gguf:f32",
    "gguf:base", "gguf:careful",
    "gguf:base+q8_0", "gguf:q8_0", "gguf:q4_0", "onnx:float32", "onnx:int8", "mlx:adapter",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--base")
    parser.add_argument("--calibrate", help="rows that the type careful rounds by")
    parser.add_argument("--only", nargs="+", default=FORMS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "gate.jsonl")
    arguments = parser.parse_args()
    base, handle, provenance = load_adapted(
        arguments.run, source=arguments.base, device="cpu", on_event=lambda event: None
    )
    in_float32(base.model)
    rows = calibration_rows(arguments.calibrate, base, lambda event: None) if arguments.calibrate else ()
    for each in arguments.only:
        form, _, kind = each.partition(":")
        with tempfile.TemporaryDirectory() as place:
            started, folder = time.monotonic(), Path(place) / "out"
            line = {"base": base.name, "method": handle.method.name, "format": form, "type": kind}
            try:
                parity = export_adapter(
                    base,
                    handle,
                    form,
                    folder,
                    type=kind or None,
                    calibration=rows,
                    allow_drift=True,
                    provenance=provenance,
                )
                sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                line |= {"parity": parity.document(), "bytes": sum(sizes)}
            except AddendaError as error:
                line |= {"error": error.message, "where": {k: str(v) for k, v in error.where.items()}}
            line["seconds"] = round(time.monotonic() - started, 1)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(each, line.get("error") or line["parity"]["verdict"], line["seconds"], flush=True)


if __name__ == "__main__":
    main()
