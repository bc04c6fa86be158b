"""A tokenizer as a GGUF file holds it: tokens, merges or scores, and the name of the way text is split before.

llama.cpp knows ways of splitting by name, and has no place for another; which one a tokenizer follows is told from the
structure of its ``tokenizer.json``. Texts come out as the same ids, but for what no key can say: text is not composed
first (``NFC``), so letters written as two code points may be tokenized otherwise; and where a text gets a blank before
it, so does every stretch of text after a control token, also one that begins with a blank.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from addenda.errors import ExportError
from addenda.export.gguf.architectures import Value

__all__ = ["tokenizer_keys"]

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
_UNREACHED = -1000.0
"""Score of a piece that no merge makes."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_MARKS = r"| ?[^\s\p{L}\p{N}]+"
_BLANKS = r"|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_LINES = r"[\r\n]*|\s*[\r\n]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAPITALS = tuple(
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}{one}{_LOWER}{two}" for one, two in (("*", "+"), ("+", "*"))
)
_SLASHES = _MARKS + r"[\r\n/]*|\s*[\r\n]+" + _BLANKS

_SPLITS: dict[tuple[str, bool], str] = {
    (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+" + _MARKS + _BLANKS, False): "gpt-2",
    (_WORDS + r"|\p{N}" + _MARKS + _LINES + _BLANKS, False): "qwen2",
    (_WORDS + r"|\p{N}{1,3}" + _MARKS + _LINES + _BLANKS, True): "llama-bpe",
    (_WORDS + r"|\p{N}{1,3}" + _MARKS + _LINES + _BLANKS, False): "dbrx",
    ("|".join(f"{way}{_CONTRACTIONS}?" for way in _CAPITALS) + r"|\p{N}{1,3}" + _SLASHES, False): "gpt-4o",
    ("|".join(_CAPITALS) + r"|\p{N}" + _SLASHES, True): "tekken",
}
"""The name of a splitting by its expression, and by whether a word that is a token is taken without merging."""


def tokenizer_keys(tokenizer: Any, rows: int) -> dict[str, Value]:
    """Return the keys of a tokenizer, without its chat template.

    Args:
        tokenizer: a fast one of transformers.
        rows: of the model's embedding; ids beyond the tokenizer's are filled up.

    Raises:
        ExportError: llama.cpp has no tokenizer like it; with those that it has.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"]["type"] != "BPE":
        raise _unknown(f"its model is {parts['model']['type']}")
    keys = _pieces(parts) if parts["model"].get("byte_fallback") else _byte_level(parts)
    tokens, types = _vocabulary(parts, rows)
    keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    if scores := keys.get("tokenizer.ggml.scores"):
        assert isinstance(scores, list)
        keys["tokenizer.ggml.scores"] = [float(s) for s in scores] + [_UNREACHED] * (rows - len(scores))
    return keys | _control_ids(tokenizer) | _added(tokenizer)


def _unknown(problem: str) -> ExportError:
    return ExportError(
        f"llama.cpp has no tokenizer like this one: {problem}",
        where={
            "known": "SentencePiece BPE; byte-level BPE that splits text as "
            + ", ".join(sorted({*_SPLITS.values(), "smollm"}))
        },
        hint="write the model as safetensors: --to merged",
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The members of a sequence, in order; a lone step is one of one."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        members = part.get("normalizers") or part.get("pretokenizers") or []
        return [step for member in members for step in _steps(member)]
    return [part]


def _byte_level(parts: dict[str, Any]) -> dict[str, Value]:
    model = parts["model"]
    normalizers = [step["type"] for step in _steps(parts["normalizer"])]
    if normalizers not in ([], ["NFC"]):
        raise _unknown(f"it rewrites text by {', '.join(normalizers)}")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("unk_token"):
        raise _unknown("it marks the parts of words, or has a token for what it does not know")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _splitting(parts),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(model)],
    }


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The pairs, best first; older files write each as one string."""
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(left, right) for left, right in pairs]


def _splitting(parts: dict[str, Any]) -> str:
    """The name that llama.cpp has for how text is split before merging."""
    steps, whole = _steps(parts["pre_tokenizer"]), bool(parts["model"].get("ignore_merges"))
    kinds = [step["type"] for step in steps]
    if any(step.get("add_prefix_space") for step in steps):
        raise _unknown("it begins each text with a blank")
    splits_itself = bool(steps) and bool(steps[-1].get("use_regex"))
    if not whole and splits_itself:
        if kinds == ["ByteLevel"]:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
            return "smollm"
    if kinds == ["Split", "ByteLevel"] and not splits_itself:
        pattern = steps[0]["pattern"].get("Regex", "")
        kept = steps[0]["behavior"] == ("Removed" if steps[0]["invert"] else "Isolated")
        if kept and (pattern, whole) in _SPLITS:
            return _SPLITS[pattern, whole]
    raise _unknown(f"it splits text by {json.dumps(steps, ensure_ascii=False)}")


def _pieces(parts: dict[str, Any]) -> dict[str, Value]:
    """SentencePiece's byte-pair encoding, whose order of merging is told by scores."""
    vocabulary: dict[str, int] = parts["model"]["vocab"]
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]:
        raise _unknown(f"it has no token for byte {missing[0]}")
    pairs = _merges(parts["model"])
    _require_all_pairs(vocabulary, pairs, {entry["content"] for entry in parts["added_tokens"]})
    made = [piece for piece, _ in itertools.groupby(left + right for left, right in pairs)]
    ranks = {piece: rank for rank, piece in enumerate(made)}
    if len(ranks) < len(made):
        raise _unknown("its merges into one piece are of several ranks")
    scores = [_UNREACHED] * (1 + max(vocabulary.values()))
    for piece, rank in ranks.items():
        scores[vocabulary[piece]] = -float(rank)
    for piece, token in vocabulary.items():
        if len(piece) == 1:
            scores[token] = -float(len(ranks))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": _begins_with_a_blank(parts),
        "tokenizer.ggml.scores": scores,
    }


def _require_all_pairs(vocabulary: dict[str, int], pairs: list[tuple[str, str]], apart: set[str]) -> None:
    """Refuse merges that leave out two neighbours that make a piece; by scores, any two that do are merged."""
    known = set(pairs)
    for piece in vocabulary.keys() - apart:
        for cut in range(1, len(piece)):
            pair = piece[:cut], piece[cut:]
            if pair not in known and pair[0] in vocabulary and pair[1] in vocabulary:
                raise _unknown(f"it does not merge '{pair[0]}' and '{pair[1]}', which make a token")


def _begins_with_a_blank(parts: dict[str, Any]) -> bool:
    """Whether a text gets a blank before it, of a tokenizer that writes blanks as U+2581 and splits nowhere."""
    blank = "\u2581"
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": blank}
    prepends = {"type": "Prepend", "prepend": blank}
    # After the blanks have been replaced there is nothing left to split at.
    idle = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    normalizers, steps = _steps(parts["normalizer"]), _steps(parts["pre_tokenizer"])
    if steps in ([], [idle]) and normalizers in ([replaces], [prepends, replaces]):
        return normalizers[0] == prepends
    if not normalizers and [step["type"] for step in steps] == ["Metaspace"]:
        (step,) = steps
        if step["replacement"] == blank and not step.get("split", True):
            return bool(step["prepend_scheme"] != "never")
    raise _unknown(f"it rewrites text by {json.dumps(normalizers + steps, ensure_ascii=False)}")


def _vocabulary(parts: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each id."""
    tokens, types = [f"[PAD{token}]" for token in range(rows)], [_UNUSED] * rows
    fallback = bool(parts["model"].get("byte_fallback"))
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)} if fallback else set()
    entries = [
        (token, text, _BYTE if text in bytes_ else _NORMAL) for text, token in parts["model"]["vocab"].items()
    ]
    entries += [
        (entry["id"], entry["content"], _CONTROL if entry["special"] else _USER_DEFINED)
        for entry in parts["added_tokens"]
    ]
    if beyond := [text for token, text, _ in entries if token >= rows]:
        raise ExportError(
            f"the tokenizer has tokens for which the model has no row, first '{beyond[0]}'",
            where={"rows": rows, "tokens beyond": len(beyond)},
            hint="resize the model's embedding to its tokenizer",
        )
    for token, text, kind in entries:
        tokens[token], types[token] = text, kind
    return tokens, types


def _control_ids(tokenizer: Any) -> dict[str, Value]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {key: getattr(tokenizer, f"{name}_token_id", None) for name, key in names.items()}
    return {f"tokenizer.ggml.{key}_token_id": token for key, token in found.items() if token is not None}


def _added(tokenizer: Any) -> dict[str, Value]:
    """What the tokenizer puts around a text by itself, seen from a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if around == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return {"tokenizer.ggml.add_bos_token": begins, "tokenizer.ggml.add_eos_token": ends}
    raise _unknown(f"it makes {around} of a text of {bare}")
