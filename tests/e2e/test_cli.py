"""The command line from end to end on a tiny model: train, look at what it left, talk, measure, export, resume."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from addenda.cli.app import run

SRC = Path(__file__).parents[2] / "src"
QUICK = (
    "--set",
    "train.epochs=4",
    "--set",
    "evals.samples=2",
    "--set",
    "evals.max_new_tokens=8",
    "--set",
    "base.dtype=float32",
)
# PEFT 0.21 asks transformers 5.23 for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def document(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """The JSON a command prints, after checking its exit code."""
    assert run([*arguments, "--json"]) == code, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def trained(tiny_model: Path, chat_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    code = run(["train", str(chat_rows), "--base", str(tiny_model), "--out", str(folder), "-q", *QUICK])
    assert code == 0
    return folder


def test_a_run_leaves_all_its_files_and_figures(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()} - {".lock"}
    files = {"recipe.resolved.toml", "environment.json", "metrics.jsonl", "summary.json", "report.html"}
    assert names == files | {"adapter", "checkpoints", "record.json"}
    summary = json.loads((trained / "summary.json").read_text())
    wanted = {
        "heldout_nll_before",
        "heldout_nll_after",
        "heldout_token_accuracy_before",
        "heldout_token_accuracy_after",
        "base_kl_general",
        "trained_tokens",
        "tokens_per_second",
        "peak_rss_bytes",
        "trainable_parameters",
        "total_parameters",
        "wall_seconds",
    }
    assert wanted <= set(summary)
    assert summary["heldout_nll_after"] < summary["heldout_nll_before"]
    assert summary["base_kl_general"] > 0
    report = (trained / "report.html").read_text()
    assert "Answers before and after" in report
    assert f"{summary['trainable_parameters']:,}" in report


def test_the_report_can_be_made_again_from_the_record(trained: Path) -> None:
    from addenda.evals.record import RunRecord
    from addenda.evals.report import render_report

    record = RunRecord.from_json((trained / "record.json").read_text())
    assert render_report(record) == (trained / "report.html").read_text()


def test_a_resumed_run_counts_the_time_of_the_parts_before(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    for state in sorted((out / "checkpoints").glob("step-*/state.json")):
        written = json.loads(state.read_text())
        written["run"]["seconds"] = 5000.0  # as if the first part had taken that long
        text = (json.dumps(written, indent=1, sort_keys=True) + "\n").encode()
        state.write_bytes(text)
        manifest = state.with_name("MANIFEST.json")
        listed = json.loads(manifest.read_text())
        listed["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        manifest.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n")
    resumed = document(capsys, "train", "--resume", "--out", str(out), "-q")
    assert resumed["train_seconds"] == 5000.0
    assert resumed["wall_seconds"] > resumed["train_seconds"]


def test_the_adapter_carries_where_it_came_from(trained: Path, tiny_model: Path, chat_rows: Path) -> None:
    provenance = json.loads((trained / "adapter" / "adapter.json").read_text())["provenance"]
    assert provenance["data"]["sha256"] == sha256(chat_rows)
    assert provenance["tokenizer_sha256"] == sha256(tiny_model / "tokenizer.json")
    assert provenance["base"]["load"] == str(tiny_model)
    assert hashlib.sha256(provenance["chat_template"].encode()).hexdigest() == provenance["template_sha256"]
    assert provenance["versions"]["torch"] == torch.__version__
    assert provenance["figures"]["steps"] > 0


def test_the_resolved_recipe_gives_the_same_adapter_again(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = trained / "recipe.resolved.toml"
    assert tomllib.loads(recipe.read_text())["train"]["epochs"] == 4
    assert "epochs = 4  # --set" in recipe.read_text()
    again = document(capsys, "train", "--recipe", str(recipe), "--out", str(tmp_path / "again"), "-q")
    files = [folder / "adapter" / "adapter.safetensors" for folder in (trained, Path(again["folder"]))]
    assert sha256(files[0]) == sha256(files[1])


def test_a_folder_in_use_is_refused_and_a_foreign_one_never_cleared(
    trained: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sha256(trained / "summary.json")
    error = document(capsys, "train", str(chat_rows), "--out", str(trained), code=7)["error"]
    assert error["type"] == "BusyError"
    assert all(flag in error["hint"] for flag in ("--resume", "--force", "--out"))
    assert sha256(trained / "summary.json") == before
    (tmp_path / "letters.txt").write_text("mine")
    document(capsys, "train", str(chat_rows), "--out", str(tmp_path), "--force", code=7)
    assert (tmp_path / "letters.txt").read_text() == "mine"


def test_force_replaces_a_run_only_when_the_new_one_can_start(
    trained: Path, tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": 3}\n')
    before = sha256(out / "adapter" / "adapter.safetensors")
    document(capsys, "train", str(bad), "--base", str(tiny_model), "--out", str(out), "--force", code=3)
    assert sha256(out / "adapter" / "adapter.safetensors") == before
    new = (
        "train",
        str(chat_rows),
        "--base",
        str(tiny_model),
        "--out",
        str(out),
        "--force",
        "--seed",
        "3",
        *QUICK,
    )
    document(capsys, *new)
    assert sha256(out / "adapter" / "adapter.safetensors") != before
    assert "seed = 3  # flag" in (out / "recipe.resolved.toml").read_text()


def test_bad_data_stops_before_anything_is_loaded_or_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"messages": 3}\n')
    out = tmp_path / "out"
    error = document(capsys, "train", str(bad), "--base", "no-such-model", "--out", str(out), code=3)["error"]
    assert f"{bad}:2:" in error["message"]
    assert not [path for path in out.glob("*") if path.name != ".lock"]
    assert document(capsys, "check", str(bad), code=3)["ok"] is False


def test_missing_things_are_not_found(
    tmp_path: Path, chat_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert document(capsys, "check", str(tmp_path / "none.jsonl"), code=4)["error"]["type"] == "NotFoundError"
    document(capsys, "train", str(chat_rows), "--base", "no-such-model", "--out", str(tmp_path / "o"), code=4)
    document(capsys, "train", "--resume", "--out", str(tmp_path / "p"), code=4)
    document(capsys, "chat", "--adapter", str(tmp_path), "--prompt", "hi", code=4)
    document(capsys, "methods", "lroa", code=4)


def test_flags_that_contradict_each_other_are_refused(
    trained: Path, chat_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = document(capsys, "train", "--resume", "--force", "--out", str(trained), code=2)["error"]
    assert "--resume and --force" in error["message"]
    for flags in (("--method", "ia3"), ("--targets", "q_proj"), ("--set", "base.template=plain")):
        error = document(capsys, "eval", str(chat_rows), "--adapter", str(trained), *flags, code=2)["error"]
        assert "decided by the adapter" in error["message"]


@pytest.mark.parametrize("text", ["{not json", "[1]", '{"base_model_name_or_path": 3}'])
def test_a_broken_peft_folder_is_named_and_no_fault_of_ours(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    run(["chat", "--adapter", str(tmp_path), "--prompt", "hi", "--json"])
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] in ("CheckpointError", "NotFoundError")
    assert "adapter" in error["message"]


def test_dry_run_prints_every_value_with_its_origin(
    chat_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = document(capsys, "train", str(chat_rows), "--dry-run", "--set", "method.rank=3", "--seed", "7")
    assert shown["method.rank"] == {"value": 3, "origin": "--set"}
    assert shown["train.seed"] == {"value": 7, "origin": "flag"}
    assert shown["train.epochs"]["origin"] == "default"


def test_check_marks_the_trained_tokens(
    tiny_model: Path, chat_rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("check", str(chat_rows), "--show", "1", "--base", str(tiny_model))
    shown = document(capsys, *arguments)
    marked = "".join(part["text"] for part in shown["shown"][0]["segments"] if part["trained"])
    assert marked == "Yes, one red hat.</s>"
    assert (shown["parts"]["train"]["rows"], shown["ok"]) == (40, True)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert run(list(arguments)) == 0
    assert "assistant: [Yes, one red hat.</s>]" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(list(arguments)) == 0
    assert "assistant: \x1b[32mYes, one red hat.</s>\x1b[0m" in capsys.readouterr().out


def test_plan_counts_what_train_trains(
    trained: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = document(capsys, "plan", "--base", str(tiny_model))
    summary = json.loads((trained / "summary.json").read_text())
    assert planned["parameters"] == summary["trainable_parameters"]
    assert sum(layer["parameters"] for layer in planned["layers"]) == planned["parameters"]
    assert planned["forecast"]["ledger"]["total"] > planned["bytes"]
    error = document(capsys, "plan", "--base", str(tiny_model), "--targets", "q_prj,v_proj", code=2)["error"]
    assert "did you mean 'q_proj'" in error["hint"]


def test_what_an_export_cannot_carry_is_said_before_anything_is_trained(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", str(chat_rows), "--base", str(tiny_model), "--out", str(tmp_path / "run"), "-q"]
    method = ["--method", "prefix-tuning", "--set", "method.tokens=2", "--set", "train.epochs=1"]
    assert run([*given, *method, "--set", "train.export_to=merged"]) == 2
    said = capsys.readouterr().err
    assert "method 'prefix-tuning' cannot be merged" in said
    assert "peft can carry it" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert run([*given, *method, "--set", "train.export_to=peft", "--set", "evals.samples=0"]) == 0
    assert '"peft"' in (tmp_path / "run" / "recipe.resolved.toml").read_text()


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_mixture_is_refused_with_where_to_find_how_it_is_trained(
    verb: str,
    tiny_model: Path,
    chat_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run([verb, str(chat_rows), "--base", str(tiny_model), "--method", "adapter-fusion", "-q"]) == 2
    said = capsys.readouterr().err
    assert "mixes other adapters, which a recipe cannot load" in said
    assert "several-adapters.md" in said


def test_plan_foretells_the_run_and_refuses_one_that_does_not_fit(
    trained: Path, tiny_model: Path, chat_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    arguments = ["plan", str(chat_rows), "--base", str(tiny_model), *QUICK]
    found = document(capsys, *arguments)["forecast"]
    foretold = summary["forecast"]
    for name in ("steps", "tokens", "tokens_per_micro_batch", "recompute"):
        assert found[name] == foretold[name]
    assert foretold["steps"] >= summary["steps"]
    assert foretold["seconds"] > 0
    assert (
        abs(foretold["ledger"]["activations"] - found["ledger"]["activations"])
        <= 0.05 * found["ledger"]["total"]
    )
    assert run([*arguments, "--set", "train.memory_gib=0.01"]) == 5
    error = capsys.readouterr().err
    assert "does not fit into 10 MiB" in error
    assert "train.memory_gib=" in error


def test_eval_measures_with_and_without_the_adapter(
    trained: Path, tiny_model: Path, chat_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = document(capsys, "eval", str(chat_rows), "--base", str(tiny_model), "--set", "base.dtype=float32")
    both = document(capsys, "eval", str(chat_rows), "--adapter", str(trained), "--set", "base.dtype=float32")
    assert both["heldout_nll_before"] == pytest.approx(base["nll"], rel=1e-6)
    assert both["heldout_nll_after"] < base["nll"]
    assert (base["rows"], both["heldout_rows"]) == (40, 40)


def test_chat_answers_once_streams_turns_and_compares(
    trained: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--max-new-tokens", "6")
    alone = document(capsys, "chat", "--base", str(tiny_model), "--prompt", "Where is the pen?", *few)[
        "answers"
    ]
    both = document(
        capsys, "chat", "--adapter", str(trained), "--compare", "--prompt", "Where is the pen?", *few
    )
    assert set(both["answers"]) == {"base", "adapted"}
    assert both["answers"]["base"] == alone["base"]
    assert both["answers"]["adapted"] != alone["base"]
    process = subprocess.run(
        [sys.executable, "-m", "addenda", "chat", "--adapter", str(trained), *few],
        input="Where is the pen?\n/reset\nWhere is the pen?\n/exit\nnever read\n",
        env={**os.environ, "PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    first, second = process.stdout.splitlines()
    assert first == second == both["answers"]["adapted"].strip()


def test_bytes_that_are_no_text_do_not_end_a_conversation(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "addenda", "chat", "--base", str(tiny_model), "--max-new-tokens", "3"]
    for locale in ("C.UTF-8", "C"):
        options: dict[str, Any] = {
            "env": {**os.environ, "PYTHONPATH": str(SRC), "LC_ALL": locale, "PYTHONUTF8": "0"},
            "capture_output": True,
            "timeout": 120,
        }
        spoken = subprocess.run(command, input=b"bad \xff byte\nwhere\n", **options)
        assert (spoken.returncode, len(spoken.stdout.splitlines())) == (0, 2), spoken.stderr
        asked = subprocess.run([*command, "--prompt", b"bad \xff byte"], **options)
        assert asked.returncode == 0, asked.stderr


def test_chat_refuses_what_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--adapter" in document(capsys, "chat", "--compare", "--prompt", "hi", code=2)["error"]["message"]
    assert "--prompt" in document(capsys, "chat", code=2)["error"]["message"]


def test_peft_export_is_proven_and_read_back(
    trained: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    out = tmp_path / "exported"
    shown = document(capsys, "export", str(trained), "--to", "peft", "--out", str(out))
    assert shown["parity"]["real"]["runtime"] == f"peft {peft.__version__}"
    assert shown["parity"]["real"]["largest_difference"] <= 1e-5
    assert json.loads((out / "export.json").read_text())["parity"] == shown["parity"]
    card = (out / "README.md").read_text()
    assert "More Information Needed" not in card
    assert "library_name: peft" in card
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    assert peft.PeftModel.from_pretrained(model, out).active_adapter == "default"
    ask = ("--prompt", "Where is the pen?", "--max-new-tokens", "6")
    ours = document(capsys, "chat", "--adapter", str(trained), *ask)["answers"]
    assert document(capsys, "chat", "--adapter", str(out), *ask)["answers"] == ours
    assert document(capsys, "export", str(trained), "--to", "peft", "--out", str(out), code=7)


def test_merged_export_answers_like_the_adapted_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    shown = document(capsys, "export", str(trained), "--to", "merged", "--out", str(out))
    assert shown["parity"]["real"]["top1_agreement"] == 1.0
    assert (out / "chat_template.jinja").is_file()
    assert not list(out.glob("*.bin"))
    import transformers

    from addenda.recipe import load_adapted

    base, _, _ = load_adapted(trained, dtype=torch.float32, on_event=lambda event: None)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out)
    row = torch.tensor([[5, 9, 33, 12, 40, 7, 21]])
    with torch.no_grad():
        assert (merged(row).logits - base.model(row).logits).abs().max() <= 1e-4
    half = document(
        capsys, "export", str(trained), "--to", "merged", "--out", f"{out}16", "--type", "bfloat16"
    )
    assert half["parity"]["twin"] != half["parity"]["real"]
    sizes = [
        path.stat().st_size for path in (out / "model.safetensors", Path(f"{out}16") / "model.safetensors")
    ]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize(
    ("method", "form", "text"),
    [
        ("bottleneck", "peft", "PEFT has no bottleneck adapters"),
        ("bottleneck", "merged", "cannot be merged"),
        ("bitfit", "merged", "no place for"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    method: str,
    form: str,
    text: str,
    tiny_model: Path,
    chat_rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import addenda

    base = addenda.load_base(tiny_model)
    from addenda.core import registry

    addenda.attach(base.model, registry.get(method)())
    addenda.save(base.model, tmp_path / "adapter", provenance={"base": {"load": str(tiny_model)}})
    out = tmp_path / "exports" / "out"
    run(["export", str(tmp_path / "adapter"), "--to", form, "--out", str(out), "--json"])
    assert text in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not list(out.parent.glob("*"))


def test_ctrl_c_saves_and_resume_ends_with_the_same_bits(
    tiny_model: Path, chat_rows: Path, tmp_path: Path
) -> None:
    def start(folder: Path, *more: str) -> subprocess.Popen[str]:
        settings = (
            "--set",
            "train.epochs=20",
            "--set",
            "train.patience=1000",
            "--set",
            "train.evals_per_epoch=1",
        )
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "addenda",
                "train",
                *more,
                "--out",
                str(folder),
                *settings,
                *QUICK[2:],
                "--json",
            ],
            env={**os.environ, "PYTHONPATH": str(SRC)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    new = (str(chat_rows), "--base", str(tiny_model))
    whole = start(tmp_path / "whole", *new)
    broken = start(tmp_path / "broken", *new)
    metrics = tmp_path / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count('"step"') < 5):
        time.sleep(0.02)
    broken.send_signal(signal.SIGINT)
    out, err = broken.communicate(timeout=60)
    assert broken.returncode == 130, err
    assert f"addenda train --resume --out {tmp_path / 'broken'}" in err
    assert json.loads(out)["error"]["type"] == "Interrupted"
    assert not (tmp_path / "broken" / "adapter").exists()
    resumed = start(tmp_path / "broken", "--resume")
    assert resumed.communicate(timeout=120)[0], "the resumed run printed no summary"
    assert whole.communicate(timeout=120)[0], "the whole run printed no summary"
    assert (resumed.returncode, whole.returncode) == (0, 0)
    files = [tmp_path / name / "adapter" / "adapter.safetensors" for name in ("whole", "broken")]
    assert sha256(files[0]) == sha256(files[1])


def test_a_model_stored_in_four_bits_is_trained_as_it_is(
    tiny_model: Path, chat_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    import transformers

    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, quantization_config=settings
    )
    base, folder = tmp_path / "base", tmp_path / "run"
    model.save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    stored = {path.name: sha256(path) for path in base.iterdir()}

    options = ("--base", str(base), "--out", str(folder), *QUICK, "--set", "train.optimizer=adamw8bit")
    assert run(["train", str(chat_rows), "-q", *options]) == 0, capsys.readouterr().err
    capsys.readouterr()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["heldout_nll_change"] < 0
    assert {path.name: sha256(path) for path in base.iterdir()} == stored
    ask = ("--prompt", "Is the pen yours?", "--max-new-tokens", "4")
    assert document(capsys, "chat", "--adapter", str(folder), *ask)["answers"]
    own = ("--to", "merged", "--type", "base", "--allow-drift", "--out", str(tmp_path / "merged"))
    assert document(capsys, "export", str(folder), *own)["parity"]["twin"]["largest_difference"] < 1e-3
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())
    parity = document(capsys, "export", str(folder), "--to", "peft", "--out", str(tmp_path / "peft"))
    assert (tmp_path / "peft" / "adapter_model.safetensors").exists()
    assert parity
