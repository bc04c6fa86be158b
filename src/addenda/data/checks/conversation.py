"""Checks of a conversation as a whole: who begins, who answers, what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from addenda.data.checks.base import Check, register
from addenda.data.checks.messages import ROLES
from addenda.data.problem import Problem, Turn

__all__ = ["ExampleMissingAssistantMessage", "FirstRole", "NoTrainableToken", "RolesNotAlternating"]

_GOOD = b'{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}\n'


@register
class ExampleMissingAssistantMessage(Check):
    """A conversation has no assistant message.

    What it finds: a row whose messages are all from others.
    Why it matters: there is nothing to learn from it, yet it costs as much time as a good row.
    Example: a log in which nobody answered.
    What to do: add the answer, or remove the row.
    """

    code, severity, stage = "example_missing_assistant_message", "error", "turns"
    fix = "add the answer, or remove the row"
    bad = b'{"messages": [{"role": "user", "content": "Hi."}]}\n'
    good = _GOOD

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        roles = [turn.fields.get("role") for turn in turns]
        # A role that is wrong or missing is named by its own check; it may have been meant for the assistant.
        if roles and all(isinstance(role, str) and role in ROLES and role != "assistant" for role in roles):
            yield cls.problem(f"{len(turns)} messages, none from the assistant", path=turns[0].path[:1])


@register
class FirstRole(Check):
    """A conversation begins with neither a system nor a user message.

    What it finds: a first message from the assistant or a tool.
    Why it matters: at use, the model never speaks first; many templates refuse such a row.
    Example: a chat that opens with the shop's greeting.
    What to do: begin with the user's message; put a greeting into the system message.
    """

    code, severity, stage = "first_role", "error", "turns"
    fix = "begin with a system or user message"
    bad = _GOOD.replace(
        b'[{"role": "user"', b'[{"role": "assistant", "content": "Welcome."}, {"role": "user"'
    )
    good = _GOOD

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        role = turns[0].fields.get("role") if turns else "user"
        if role in ("assistant", "tool", "function"):
            yield cls.problem(f"the first message is from '{role}'", path=turns[0].at("role"))


@register
class RolesNotAlternating(Check):
    """Two messages in a row come from the same side.

    What it finds: user after user, assistant after assistant (tool calls aside), or a system message after the first.
    Why it matters: some templates refuse it, and the model rarely meets it at use. It is a warning: chat logs have it.
    Example: a customer who writes two messages before the answer.
    What to do: join the two messages if the template refuses them, or if it happens often.
    """

    code, severity, stage = "roles_not_alternating", "warning", "turns"
    fix = "join the two messages, or leave it if your chats are like that"
    bad = _GOOD.replace(b'[{"role": "user"', b'[{"role": "user", "content": "Hello?"}, {"role": "user"')
    good = _GOOD

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        for before, turn in pairwise(turns):
            role = turn.fields.get("role")
            repeated = role in ("user", "assistant") and before.fields.get("role") == role
            if repeated and before.fields.get("tool_calls"):
                continue
            if repeated or role in ("system", "developer"):
                yield cls.problem(f"'{role}' after '{before.fields.get('role')}'", path=turn.at("role"))


@register
class NoTrainableToken(Check):
    """Nothing in a row is trained on.

    What it finds: a row whose assistant messages all have the weight 0, or that was cut before its first answer.
    Why it matters: it is the commonest silent failure: the row costs time and teaches nothing, and where every
    row is so, the loss is zero and nothing was learned. One row is a warning; all rows are an error.
    Example: ``"weight": 0`` on the only answer.
    What to do: remove the row, give an answer the weight 1, or raise the token limit.
    """

    code, severity, stage = "no_trainable_token", "warning", "turns"
    fix = "remove the row, or give one answer the weight 1"
    bad = _GOOD.replace(b'"Hello."', b'"Hello.", "weight": 0') + _GOOD
    good = _GOOD

    @classmethod
    def find(cls, turns: Sequence[Turn]) -> Iterator[Problem]:
        answers = [turn for turn in turns if turn.fields.get("role") == "assistant"]
        if answers and all(turn.fields.get("weight", 1) in (0, False) for turn in answers):
            yield cls.problem("every answer has the weight 0", path=answers[0].at("weight"))
