"""Every export of one trained adapter, each through the gate: what it costs, what it keeps, in the program it is for.

    python benchmarks/exports/run.py RUN [--calibrate DATA] [--only gguf-lora gguf:q4_0 ...] [--out FILE]
    python benchmarks/exports/run.py minilm --data FILE
    python benchmarks/exports/run.py efficientnet-lite0

RUN is a run folder or an adapter, such as `addenda train examples/data/support.jsonl` leaves; the others are trained
here, for a few minutes. One JSON line an export.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import trained

from addenda.errors import AddendaError
from addenda.export.run import Gated, export_adapter


def line_of(subject: trained.Trained, form: str, kind: str) -> dict[str, Any]:
    """Export in one form, and say what the gate found, whether it let the file through or not."""
    line: dict[str, Any] = {
        "base": subject.name,
        "method": subject.handle.method.name,
        "format": form,
        "type": kind,
        "learnt": subject.learnt,
    }

    def keep(found: Gated) -> None:
        line.update(parity=found.parity.document(), bytes=found.bytes)

    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        try:
            export_adapter(
                subject.base,
                subject.handle,
                form,
                Path(place) / "out",
                type=kind or None,
                allow_drift=True,
                on_gated=keep,
                **subject.given,
            )
        except AddendaError as error:
            line |= {"error": error.message, "where": {k: str(v) for k, v in error.where.items()}}
    return line | {"seconds": round(time.monotonic() - started, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", metavar="RUN | minilm | efficientnet-lite0")
    parser.add_argument("--base", help="of RUN, where the adapter does not say")
    parser.add_argument("--calibrate", help="rows that the type careful rounds by")
    parser.add_argument("--data", help="what minilm learns: CSV with 'text' and 'category'")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "gate.jsonl")
    arguments = parser.parse_args()
    if arguments.subject == "minilm":
        subject = trained.minilm(arguments.data)
    elif arguments.subject == "efficientnet-lite0":
        subject = trained.efficientnet()
    else:
        subject = trained.of_run(arguments.subject, arguments.base, arguments.calibrate)
    print(subject.name, subject.learnt, flush=True)
    for each in arguments.only or subject.forms:
        form, _, kind = each.partition(":")
        line = line_of(subject, form, kind)
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(each, line.get("error") or line["parity"]["verdict"], line["seconds"], flush=True)


if __name__ == "__main__":
    main()
