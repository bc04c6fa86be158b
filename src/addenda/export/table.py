"""The gate's findings as a Markdown table."""

from __future__ import annotations

from addenda.export.parity import Closeness, Parity

__all__ = ["gate_table"]


def gate_table(parity: Parity) -> str:
    """Return the verdict and, where there is one, the table of what was measured."""
    told = {name: each for name, each in (("exact twin", parity.twin), ("the file", parity.real)) if each}
    if parity.twin is parity.real:
        told.pop("exact twin", None)
    lines = [f"**{parity.verdict}**: {parity.words}"]
    if told:
        lines += ["", f"| | {' | '.join(told)} |", f"|---{'|---' * len(told)}|"]
        columns = [_figures(each) for each in told.values()]
        lines += [f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0]]
        lines += ["", f"The adapter changes an answer by up to {parity.effect:.3g}."]
    if parity.chat:
        chat = parity.chat
        lines += [
            "",
            f"Of {chat.conversations} conversations the template writes {chat.same_text} alike, and the "
            f"tokenizer reads {chat.same_tokens} alike.",
        ]
    return "\n".join(lines)


def _figures(each: Closeness) -> dict[str, str]:
    return {
        "loaded with": each.runtime,
        "positions": str(each.positions),
        "largest difference": f"{each.largest_difference:.2g}",
        "KL from the trained model, nats": f"{each.kl:.2g}" if each.kl else "",
        "same first choice": "" if each.top1_agreement is None else f"{each.top1_agreement:.1%}",
        "the adapter's change, size kept": f"{each.effect_size:.1%}" if each.effect_size else "",
        "the adapter's change, cosine": f"{each.effect_cosine:.4f}" if each.effect_cosine else "",
    }
