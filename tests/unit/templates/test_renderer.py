from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models

from addenda.errors import UnsafeError
from addenda.templates import TemplateRefusal, compile_template, render

HI = [{"role": "user", "content": "Hi."}]
ECHO = "{{ messages[0].content }}"

BOMBS = {
    "a long string, folded when compiled": "{{ 'a' * 200000000 }}",
    "a long string, made when rendered": "{{ messages[0].role * 2000000000 }}",
    "a padded number": "{{ '%2000000000d' % 1 }}",
    "a format": "{{ '{:2000000000d}'.format(1) }}",
    "a filter": "{{ 'a' | center(2000000000) }}",
    "a list": "{{ [0] * 10000000000 }}",
    "doubling": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
    ),
    "a power": "{{ (9 ** 9) ** (9 ** 7) }}",
    "nested loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filler": "{{ lipsum(n=100000000) }}",
    "much text": "{% for i in range(100000) %}{{ 'abcdefghij' * 40 }}{% endfor %}",
}

TEMPLATES = [
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "{%- for m in messages -%}\n    {%- generation -%} {{ m.content | trim }} {%- endgeneration -%}\n{%- endfor -%}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}\n  {% endfor %}",
    "{% set n = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set n.last = loop.index0 %}{% endif %}{% endfor %}{{ n.last }}{{ dict(a=1, b='é') | tojson }}",
    "{{ tools | tojson(indent=2) if tools is not none else 'no tools' }}{{ documents }}{{ undefined_name }}",
    "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.tool_calls }}|{{ m }}{% endfor %}",
    "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system role, please') }}{% endfor %}",
    "{{ messages[7].content }}",
    "{{ bos_token }}{{ messages | map(attribute='content') | join('<&>') | upper }}",
    "{{ messages[0].__class__ }}{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
]
TOOLS = [
    {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "x": ["é", 1.5]}}}
]
CALL = {"type": "function", "function": {"name": "find", "arguments": {"q": "ü", "n": [1, None, True]}}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    HI,
    [
        {"role": "system", "content": " Be brief.\n"},
        *HI,
        {"role": "assistant", "content": "\u2028 '\"<b>\\ \U0001f642"},
    ],
    [*HI, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "found"}],
    [*HI, {"role": "assistant", "content": "a", "reasoning_content": "because"}, *HI],
    [*HI, {"role": "assistant", "content": "a", "thinking": "so"}],
    [{"role": "user", "content": [{"type": "text", "text": "in parts"}]}],
    [{"role": "user", "content": "half \ud83d of a character"}],
]


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def outcome(call: Any, *errors: type[Exception]) -> tuple[str, str]:
    try:
        return "text", call()
    except errors as error:
        return "refused", str(error)


@pytest.mark.parametrize("source", TEMPLATES)
def test_texts_and_refusals_are_those_of_transformers(
    source: str, tokenizer: transformers.PreTrainedTokenizerFast
) -> None:
    for messages in CONVERSATIONS:
        for tools in (None, TOOLS):
            for prompt in (False, True):
                more = {"tools": tools, "add_generation_prompt": prompt}
                theirs = outcome(
                    lambda messages=messages, more=more: tokenizer.apply_chat_template(
                        messages, chat_template=source, tokenize=False, **more
                    ),
                    Exception,
                )
                ours = outcome(
                    lambda messages=messages, more=more: render(
                        source, messages, special_tokens=tokenizer.special_tokens_map, **more
                    ),
                    TemplateRefusal,
                )
                assert ours == theirs


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_takes_too_much_is_refused_soon_and_the_next_one_is_rendered(name: str) -> None:
    begun = time.perf_counter()
    with pytest.raises(UnsafeError, match="the chat template takes more") as caught:
        render(BOMBS[name], HI, special_tokens={})
    assert time.perf_counter() - begun < 10  # about one second; more only where others use the processor
    assert caught.value.hint
    assert render(ECHO, HI, special_tokens={}) == "Hi."


def test_compiling_is_bounded_too() -> None:
    with pytest.raises(UnsafeError, match="the chat template takes more"):
        compile_template("{{ 'a' * 200000000 }}")
    with pytest.raises(TemplateRefusal, match="Unexpected end of template"):
        compile_template("{% for m in messages %}")
    compile_template(BOMBS["nested loops"])


def test_the_time_allowed_grows_with_the_conversation() -> None:
    """A row of a million characters, written out many times over, is no attack."""
    long = [{"role": "user", "content": "word " * 200_000}]
    assert len(render("{{ messages[0].content }}" * 8, long, special_tokens={})) == 8_000_000


def test_a_child_can_write_no_file_and_has_little_memory() -> None:
    limits = "import resource; print(resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_AS))"
    code = f"import addenda.templates.child as child; child._confine(); {limits}"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split("\n")[0] == f"(0, 0) ({512 * 2**20}, {512 * 2**20})"


def test_threads_get_their_own_answers() -> None:
    def one(number: int) -> bool:
        return render(ECHO, [{"role": "user", "content": str(number)}], special_tokens={}) == str(number)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(400)))


def test_an_interrupted_request_is_not_answered_to_the_next() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            render(
                "{% for i in range(100000) %}{% for j in range(9) %}{% endfor %}{% endfor %}" * 9,
                HI,
                special_tokens={},
            )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render(ECHO, HI, special_tokens={}) == "Hi."


def test_after_a_fork_both_processes_render() -> None:
    code = """
import os
from addenda.templates import render
def echo(text):
    return render("{{ messages[0].content }}", [{"content": text}], special_tokens={})
def right(word):
    return all(echo(word * i) == word * i for i in range(300))
assert right("a")
pid = os.fork()
fine = right("b" if pid else "c")
if pid == 0:
    os._exit(not fine)
assert fine and os.waitpid(pid, 0)[1] == 0
assert right("d")
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to look for the process")
def test_the_child_ends_with_its_parent() -> None:
    code = """
import os
from addenda.templates import render, renderer
render("x", [{}], special_tokens={})
print(renderer._CHILD._process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert answer.returncode == -9
    until = time.perf_counter() + 20
    while _runs(int(answer.stdout)):
        assert time.perf_counter() < until
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
