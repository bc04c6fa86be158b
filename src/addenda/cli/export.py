"""``addenda export``: write an adapter in a form other tools load, proven before it appears."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.verb import verb
from addenda.errors import ConfigError
from addenda.export.names import format_names, format_summaries

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
@click.option(
    "--to",
    "form",
    type=click.Choice(format_names()),
    required=True,
    help=" ".join(f"{name}: {told}" for name, told in format_summaries().items()),
)
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

    What was written is loaded again and must answer like the adapted model, or nothing appears. Set train.export_to
    before training, and what the form cannot carry is said then.
    """
    with Display(console) as display:
        parity = _export(adapter, form, out, base=base, dtype=dtype, display=display)
    document = {"adapter": adapter, "to": form, "folder": out, "parity": asdict(parity)}
    console.result(document, f"wrote {out}\n{parity}")


def _export(
    adapter: str, form: str, out: str, *, base: str | None, dtype: str | None, display: Display
) -> Parity:
    from addenda.export.format import format_of
    from addenda.recipe import load_adapted

    wanted = format_of(form)
    if dtype is not None and dtype not in wanted.dtypes:
        choices = f"one of {', '.join(wanted.dtypes)}" if wanted.dtypes else "no --dtype"
        raise ConfigError(f"--to {form} takes {choices}", hint="leave it out to keep what is stored")
    loaded, handle, provenance = load_adapted(adapter, source=base, device="cpu", on_event=display)
    stored = str(loaded.model.dtype).removeprefix("torch.")
    # In float32 the proof sees the export's own error, not that of the arithmetic; codes cannot be widened.
    if not getattr(loaded.model, "is_quantized", False):
        loaded.model.float()
    kind = dtype or (stored if stored in wanted.dtypes else None)
    return wanted.write(loaded, handle, out, dtype=kind, provenance=provenance, on_progress=display)
