"""``addenda export``: write an adapter in a form other tools load, proven before it appears."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.verb import verb
from addenda.export.names import format_names, format_summaries

if TYPE_CHECKING:
    from addenda.export.parity import Parity

__all__ = ["command"]


@verb(
    "export",
    examples=[
        "addenda export runs/support/adapter --to peft --out exported/support",
        "addenda export runs/support/adapter --to merged --out exported/support-merged --type bfloat16",
        "addenda export runs/support --to gguf-lora --out exported/support-gguf",
        "addenda export runs/support --to gguf --type careful --calibrate support.jsonl --out exported/small",
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
@click.option("--type", "kind", metavar="TYPE", help="Of the written numbers, as the format names them.")
@click.option("--calibrate", metavar="DATA", help="Rows of the task, for types that round with care.")
@click.option(
    "--allow-drift", is_flag=True, help="Write it although it has lost something or could not be proven."
)
def command(  # noqa: PLR0917  (click hands every option over)
    console: Console,
    adapter: str,
    form: str,
    out: str,
    base: str | None,
    kind: str | None,
    calibrate: str | None,
    *,
    allow_drift: bool,
) -> None:
    """Write ADAPTER, an adapter or run folder, in a form other tools load.

    What was written is loaded again in the program it is for and must answer like the adapted model, or nothing
    appears. Set train.export_to before training, and what the form cannot carry is said then. The report of the run
    that made the adapter shows what was found.
    """
    with Display(console) as display:
        parity = _export(
            adapter, form, out, base, kind, calibrate=calibrate, allow_drift=allow_drift, display=display
        )
    document = {"adapter": adapter, "to": form, "folder": out, "parity": parity.document()}
    console.result(document, f"wrote {out}\n{parity}")


def _export(
    adapter: str,
    form: str,
    out: str,
    base: str | None,
    kind: str | None,
    *,
    calibrate: str | None,
    allow_drift: bool,
    display: Display,
) -> Parity:
    from addenda.bases.place import in_float32
    from addenda.export.format import require_type
    from addenda.export.run import export_adapter
    from addenda.recipe import load_adapted
    from addenda.recipe.calibrating import calibration_rows
    from addenda.recipe.exports import reported_exports

    require_type(form, kind)
    loaded, handle, provenance = load_adapted(adapter, source=base, device="cpu", on_event=display)
    in_float32(loaded.model)
    rows = calibration_rows(calibrate, loaded, display) if calibrate else ()
    with reported_exports(adapter, display) as on_gated:
        return export_adapter(
            loaded,
            handle,
            form,
            out,
            type=kind,
            calibration=rows,
            allow_drift=allow_drift,
            provenance=provenance,
            on_progress=display,
            on_gated=on_gated,
        )
