"""Ask a trained support bot 60 questions it has never seen, and count right facts and right voice.

Run after `make demo`: python examples/03_score_the_support_bot.py runs/demo
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch

from addenda.bases.generate import generate
from addenda.recipe import load_adapted

QUESTIONS = Path(__file__).parent / "data" / "support_questions.jsonl"
SIGN_OFF = "Fern at Marrowby"


def holds(answer: str, groups: list[list[str]]) -> bool:
    """Tell whether the answer has one string of every group; a number counts whole, so 12 years are not 2 years."""
    return all(
        any(re.search(rf"(?<!\d){re.escape(text)}", answer, re.IGNORECASE) for text in group)
        for group in groups
    )


def main(folder: str) -> None:
    """Print each wrong answer with what it lacks, then the counts."""
    questions = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    base, handle, _ = load_adapted(folder, dtype=torch.bfloat16, on_event=lambda event: None)
    prompts = [[{"role": "user", "content": question["prompt"]}] for question in questions]
    answers = generate(base, prompts, max_new_tokens=96)
    with handle.disabled():
        untrained = generate(base, prompts, max_new_tokens=96)
    for question, answer in zip(questions, answers, strict=True):
        if not holds(answer, question["must_contain"]):
            print(
                f"- {question['prompt']}\n    {' '.join(answer.split())}\n    lacks: {question['must_contain']}"
            )
    for name, given in (("base", untrained), ("tuned", answers)):
        facts = sum(holds(answer, q["must_contain"]) for answer, q in zip(given, questions, strict=True))
        voice = sum(SIGN_OFF in answer for answer in given)
        print(f"{name}: {facts} of {len(questions)} as the shop would answer, {voice} in the shop's voice")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
