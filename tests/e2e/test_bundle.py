"""A bundle from the command line: written, checked where it is, checked by its own script, and caught when damaged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
import torch
import transformers

import addenda
from addenda.bases import load_base
from addenda.cli.app import run as command_line
from addenda.export.runtimes.llama_cpp import LlamaCppWithAdapter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is not installed (extra 'llamacpp')"
)


def run(*arguments: str) -> int:
    return command_line([*arguments, "--json"])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bundle")
    config = transformers.LlamaConfig(**{**tiny_gguf.LLAMA, "initializer_range": 0.15})
    model = transformers.LlamaForCausalLM(config).eval()
    file = tiny_gguf.write_gguf(root / "tiny.gguf", model, quantize=["Q8_0"])
    base = load_base(file, cache_dir=root / "cache", weights="packed")
    handle = addenda.attach(base.model, addenda.LoRA(rank=4))
    with torch.no_grad():
        for parameter in handle.parameters():
            parameter.normal_(std=0.15)
    known = {"base": {"load": str(file), "weights": "packed"}}
    addenda.save(base.model, root / "adapter", provenance=known)
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the 12 ", "1 the the 2 ")) * 8)
    told = run(
        "bundle", str(root / "adapter"), "--to", "gguf-lora", "--to", "gguf:q8_0", "--to", "gguf:careful",
        "--with-base", "--calibrate", str(rows), "--out", str(root / "out"),
    )  # fmt: skip
    assert told == 0
    return root / "out"


def test_it_holds_what_is_needed(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    assert set(manifest["exports"]) == {"gguf-lora", "gguf-q8_0", "gguf-careful"}
    assert all(each["parity"]["verdict"] == "passed" for each in manifest["exports"].values())
    assert manifest["license"] == "mit"
    assert set(manifest["sha256"]) == {
        path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()
    } - {"bundle.json"}
    assert (bundle / "tokenizer" / "chat_template.jinja").is_file()
    assert "| loaded with |" in (bundle / "README.md").read_text()


def test_what_an_export_needs_is_asked_for_before_anything_is_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = str(bundle.parent / "adapter"), tmp_path / "out"
    assert run("bundle", adapter, "--to", "gguf:careful", "--out", str(out)) == 1
    assert "--calibrate" in json.loads(capsys.readouterr().out)["error"]["hint"]
    assert run("bundle", adapter, "--to", "peft", "--context", "64", "--out", str(out)) == 2
    assert "no context to choose" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not out.exists()


def test_it_passes_here(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", str(bundle)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["runtime"].startswith("llama.cpp")
    assert found["kl"] < 0.05
    assert run("verify", str(bundle / "gguf-lora")) == 0
    assert "a self-test comes with 'addenda bundle'" in capsys.readouterr().out


def test_its_own_script_needs_nothing_of_addenda(bundle: Path) -> None:
    script = bundle / "selftest.py"
    assert len(script.read_text().splitlines()) <= 110
    assert "addenda" not in script.read_text()
    adapter = bundle / "gguf-lora" / "adapter.gguf"
    with LlamaCppWithAdapter(
        bundle / "base.gguf", [adapter], exact=False, context=128, vocabulary=len(tiny_gguf.TOKENS)
    ) as server:
        command = [sys.executable, "-I", str(script), "--server", server._address]
        well = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert well.returncode == 0, well.stderr
    assert "damaged: none" in well.stdout
    with LlamaCppWithAdapter(
        bundle / "base.gguf", [], exact=False, context=128, vocabulary=len(tiny_gguf.TOKENS)
    ) as server:
        command[-1] = server._address
        bare = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert bare.returncode == 1, "a server without the adapter has to fail"


def test_a_damaged_file_and_another_base_are_told(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes((bundle / "base.gguf").read_bytes()[:-1] + b"\x01")
    assert run("verify", str(bundle), "--base", str(other)) == 1
    assert "another base" in json.loads(capsys.readouterr().out)["error"]["message"]
    file = bundle / "gguf-lora" / "adapter.gguf"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert run("verify", str(bundle)) == 1
        found = json.loads(capsys.readouterr().out)["error"]
        assert "damaged: gguf-lora/adapter.gguf" in found["where"]["found"]
    finally:
        file.write_bytes(whole)
    assert run("verify", str(tmp_path)) == 4
