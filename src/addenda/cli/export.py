"""``addenda export``: write an adapter in a form other tools load, proven before it appears."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.verb import verb
from addenda.errors import ConfigError

if TYPE_CHECKING:
    from addenda.export.parity import Parity

__all__ = ["command"]


@verb(
    "export",
    examples=[
        "addenda export runs/support/adapter --to peft --out exported/support",
        "addenda export runs/support/adapter --to merged --out exported/support-merged --dtype bfloat16",
    ],
)
@click.argument("adapter")
@click.option("--to", "form", type=click.Choice(["peft", "merged"]), required=True, help="What to write.")
@click.option("--out", metavar="FOLDER", required=True, help="The new folder.")
@click.option("--base", metavar="MODEL", help="The model. [default: the adapter's]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of merged weights. [default: as stored]",
)
def command(
    console: Console, adapter: str, form: str, out: str, *, base: str | None, dtype: str | None
) -> None:
    """Write ADAPTER, an adapter or run folder, in a form other tools load.

    peft: a folder that PEFT loads unchanged. merged: a model folder that transformers loads, with the adapter folded
    into the weights. What was written is loaded again and must answer like the adapted model, or nothing appears.
    """
    if dtype is not None and form == "peft":
        raise ConfigError(
            "--dtype goes with --to merged", hint="a PEFT folder holds the adapter's float32 weights"
        )
    with Display(console) as display:
        parity = _export(adapter, form, out, base=base, dtype=dtype, display=display)
    document = {"adapter": adapter, "to": form, "folder": out, "parity": asdict(parity)}
    console.result(document, f"wrote {out}\n{parity}")


def _export(
    adapter: str, form: str, out: str, *, base: str | None, dtype: str | None, display: Display
) -> Parity:
    import torch

    from addenda.export.merged import export_merged
    from addenda.export.peft import export_peft
    from addenda.recipe import load_adapted

    loaded, handle, provenance = load_adapted(adapter, source=base, device="cpu", on_event=display)
    stored = loaded.model.dtype
    # In float32 the proof sees the export's own error, not that of the arithmetic; codes cannot be widened.
    if not getattr(loaded.model, "is_quantized", False):
        loaded.model.float()
    if form == "peft":
        return export_peft(loaded, handle, out, provenance=provenance, on_progress=display)
    kind = stored if dtype is None else getattr(torch, dtype)
    return export_merged(loaded, handle, out, dtype=kind, provenance=provenance, on_progress=display)
