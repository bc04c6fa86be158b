"""``addenda bundle``: exports, their proof and a self-test in one folder."""

from __future__ import annotations

import click

from addenda.cli.console import Console
from addenda.cli.display import Display
from addenda.cli.verb import verb

__all__ = ["command"]


@verb(
    "bundle",
    examples=[
        "addenda bundle runs/support --to gguf-lora --with-base --out bundles/support",
        "addenda bundle runs/support --to gguf:careful+q8_0 --calibrate support.jsonl --to peft --out bundles/small",
    ],
)
@click.argument("adapter")
@click.option(
    "--to",
    "forms",
    metavar="FORMAT[:TYPE]",
    multiple=True,
    required=True,
    help="An export; may be given often.",
)
@click.option("--out", metavar="FOLDER", required=True, help="The new folder.")
@click.option("--base", metavar="MODEL", help="The model. [default: the adapter's]")
@click.option("--calibrate", metavar="DATA", help="Rows of the task, for types that round with care.")
@click.option("--context", type=int, metavar="N", help="Tokens for which executorch sets a cache aside.")
@click.option("--with-base", is_flag=True, help="Copy the base's GGUF file too.")
@click.option(
    "--allow-drift", is_flag=True, help="Write it although it has lost something or could not be proven."
)
def command(  # noqa: PLR0917  (click hands every option over)
    console: Console,
    adapter: str,
    forms: tuple[str, ...],
    out: str,
    base: str | None,
    calibrate: str | None,
    context: int | None,
    *,
    with_base: bool,
    allow_drift: bool,
) -> None:
    """Put exports of ADAPTER into one folder that can be checked wherever it is used.

    Beside them lie the tokenizer, the chat template, where the adapter came from, what the gate measured, and a
    self-test: 'addenda verify FOLDER' runs it, and so does the script in it, with nothing but llama.cpp.
    """
    wanted = [(name, kind or None) for name, _, kind in (form.partition(":") for form in forms)]
    with Display(console) as display:
        from addenda.bases.place import in_float32
        from addenda.export.bundle import write_bundle
        from addenda.export.format import require_type
        from addenda.recipe import load_adapted
        from addenda.recipe.calibrating import calibration_rows
        from addenda.recipe.exports import reported_exports

        for form, kind in wanted:
            require_type(form, kind)
        loaded, handle, provenance = load_adapted(adapter, source=base, device="cpu", on_event=display)
        in_float32(loaded.model)
        rows = calibration_rows(calibrate, loaded, display) if calibrate else ()
        with reported_exports(adapter, display) as on_gated:
            found = write_bundle(
                loaded,
                handle,
                wanted,
                out,
                with_base=with_base,
                calibration=rows,
                context=context,
                allow_drift=allow_drift,
                provenance=provenance,
                on_progress=display,
                on_gated=on_gated,
            )
    document = {"folder": out, "exports": {name: parity.document() for name, parity in found.items()}}
    console.result(
        document, "\n".join([f"wrote {out}", *(f"{name}: {each}" for name, each in found.items())])
    )
