"""The set-up: what it installs where, when it does nothing, and what it refuses."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CPU_METADATA = {"name": "torch", "version": "2.13.0+cpu", "requires_dist": ["filelock", "networkx>=2.5.1"]}
CUDA_METADATA = {
    "name": "torch",
    "version": "2.13.0",
    "requires_dist": ["filelock", 'nvidia-cudnn-cu13==9.1; platform_system == "Linux"'],
}


@pytest.fixture(scope="module")
def setup(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("setup")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "tools/setup.py"):
        (tmp_path / name).write_text(f"content of {name}")
    return tmp_path


def finished(setup: ModuleType, project: Path, extras: list[str]) -> Path:
    """A folder that looks like a finished set-up of ``project``."""
    venv = project / ".venv"
    python = setup.venv_python(venv)
    python.parent.mkdir(parents=True)
    python.touch()
    stamp = {"digest": setup.fingerprint(project), "extras": extras}
    (venv / "setup-stamp.json").write_text(json.dumps(stamp))
    return venv


def distribution(venv: Path, name: str, *, version: str = "1.0") -> Path:
    """Put a whole, tiny distribution into ``venv`` and return its metadata folder."""
    site = venv / "lib" / "python3.11" / "site-packages"
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (site / f"{name}.py").touch()
    (folder / "RECORD").write_text(
        f"{name}.py,sha256=x,0\n{folder.name}/RECORD,,\n__pycache__/{name}.pyc,,\n"
    )
    return folder


# ------------------------------------------------------------------------------------------------------ the stamp


def test_a_finished_set_up_is_current(setup: ModuleType, project: Path) -> None:
    venv = finished(setup, project, ["bench", "dev"])
    assert setup.is_current(venv, setup.fingerprint(project), {"dev"})


def test_another_extra_makes_it_stale(setup: ModuleType, project: Path) -> None:
    venv = finished(setup, project, ["dev"])
    assert not setup.is_current(venv, setup.fingerprint(project), {"dev", "bench"})


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt", "tools/setup.py"])
def test_every_input_changes_the_fingerprint(setup: ModuleType, project: Path, name: str) -> None:
    before = setup.fingerprint(project)
    (project / name).write_text("other content")
    assert setup.fingerprint(project) != before


def test_the_python_version_changes_the_fingerprint(setup: ModuleType, project: Path) -> None:
    assert setup.fingerprint(project, "3.11.1") != setup.fingerprint(project, "3.12.0")


def test_content_moved_from_one_input_to_the_next_changes_the_fingerprint(
    setup: ModuleType, project: Path
) -> None:
    (project / "pyproject.toml").write_text("ab")
    (project / "constraints.txt").write_text("c")
    before = setup.fingerprint(project)
    (project / "pyproject.toml").write_text("a")
    (project / "constraints.txt").write_text("bc")
    assert setup.fingerprint(project) != before


def test_an_interrupted_set_up_is_not_current(setup: ModuleType, project: Path) -> None:
    venv = finished(setup, project, ["dev"])
    (venv / "setup-unfinished").touch()
    assert not setup.is_current(venv, setup.fingerprint(project), {"dev"})


def test_a_damaged_stamp_or_a_missing_python_is_not_current(setup: ModuleType, project: Path) -> None:
    venv, digest = finished(setup, project, ["dev"]), setup.fingerprint(project)
    (venv / "setup-stamp.json").write_text("{")
    assert not setup.is_current(venv, digest, {"dev"})
    (venv / "setup-stamp.json").write_text(json.dumps({"digest": digest, "extras": ["dev"]}))
    setup.venv_python(venv).unlink()
    assert not setup.is_current(venv, digest, {"dev"})


# ------------------------------------------------------------------------------------------------- which PyTorch


def test_the_pin_is_read_from_the_constraints(setup: ModuleType) -> None:
    assert setup.torch_requirement("sympy==1.14\ntorch==2.13.0\ntorchao==1.0\n") == "torch==2.13.0"
    with pytest.raises(setup.SetupError, match="pins no torch"):
        setup.torch_requirement("torchao==1.0\n")


def test_linux_without_gpu_asks_for_the_cpu_build_first(setup: ModuleType) -> None:
    tried = [
        arguments for arguments, _ in setup.torch_candidates("torch==2.13.0", gpu=False, platform="linux")
    ]
    assert tried[0] == ["torch==2.13.0+cpu"]
    assert tried[1][0] == "torch==2.13.0+cpu"
    assert setup.CPU_INDEX in tried[1]
    assert tried[2] == ["torch==2.13.0"]


@pytest.mark.parametrize(("gpu", "platform"), [(True, "linux"), (False, "darwin"), (False, "win32")])
def test_elsewhere_the_plain_pin_is_enough(setup: ModuleType, gpu: bool, platform: str) -> None:
    candidates = setup.torch_candidates("torch==2.13.0", gpu=gpu, platform=platform)
    assert [arguments for arguments, _ in candidates] == [["torch==2.13.0"]]


def test_a_cuda_build_is_told_by_what_it_requires(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sys, "platform", "linux")
    assert setup.cuda_packages({"install": [{"metadata": CUDA_METADATA}]}) == ["nvidia-cudnn-cu13"]
    assert setup.cuda_packages({"install": [{"metadata": CPU_METADATA}]}) == []


def test_a_cuda_build_is_told_by_its_version(setup: ModuleType) -> None:
    metadata = {"name": "torch", "version": "2.13.0+cu130"}
    assert setup.cuda_packages({"install": [{"metadata": metadata}]}) == ["torch 2.13.0+cu130"]


def test_requirements_of_other_systems_and_of_extras_do_not_count(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.sys, "platform", "darwin")
    assert setup.cuda_packages({"install": [{"metadata": CUDA_METADATA}]}) == []
    assert setup.required_name('nvidia-ml-py; extra == "monitor"') == ""
    assert setup.required_name("cuda-bindings[all]<14,>=13.0") == "cuda-bindings"


def answers(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, served: dict[str, dict]) -> list[list[str]]:
    """Let pip resolve only what ``served`` holds, and collect what would be installed."""
    installed: list[list[str]] = []

    def resolve(venv: Path, arguments: list[str]) -> tuple[dict | None, str]:
        key = " ".join(arguments[:1] + [a for a in arguments if a.startswith("https://")])
        return (served[key], "") if key in served else (None, "no matching distribution")

    def run_pip(venv: Path, arguments: list[str], *, task: str, clock: object) -> None:
        installed.append(arguments)

    monkeypatch.setattr(setup.sys, "platform", "linux")
    monkeypatch.setattr(setup, "resolve", resolve)
    monkeypatch.setattr(setup, "run_pip", run_pip)
    return installed


def test_the_configured_cpu_build_is_taken(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = {"install": [{"metadata": CPU_METADATA}]}
    done = answers(setup, monkeypatch, {"torch==2.13.0+cpu": report})
    setup.install_torch(tmp_path, "torch==2.13.0", gpu=False, clock=setup.Clock())
    assert done == [["--no-deps", "torch==2.13.0+cpu"]]


def test_the_official_cpu_index_is_the_fallback(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served = {
        f"torch==2.13.0+cpu {setup.CPU_INDEX}": {"install": [{"metadata": CPU_METADATA}]},
        "torch==2.13.0": {"install": [{"metadata": CUDA_METADATA}]},
    }
    done = answers(setup, monkeypatch, served)
    setup.install_torch(tmp_path, "torch==2.13.0", gpu=False, clock=setup.Clock())
    assert len(done) == 1
    assert done[0][:2] == ["--no-deps", "torch==2.13.0+cpu"]
    assert setup.CPU_INDEX in done[0]


def test_a_plain_cpu_build_is_accepted(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    report = {"install": [{"metadata": {**CPU_METADATA, "version": "2.13.0"}}]}
    done = answers(setup, monkeypatch, {"torch==2.13.0": report})
    setup.install_torch(tmp_path, "torch==2.13.0", gpu=False, clock=setup.Clock())
    assert done == [["--no-deps", "torch==2.13.0"]]


def test_a_cuda_build_without_a_gpu_stops_the_set_up(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = answers(setup, monkeypatch, {"torch==2.13.0": {"install": [{"metadata": CUDA_METADATA}]}})
    with pytest.raises(
        setup.SetupError, match=r"CUDA build(?s:.)*hint: put the wheel of 'torch==2.13.0\+cpu'"
    ):
        setup.install_torch(tmp_path, "torch==2.13.0", gpu=False, clock=setup.Clock())
    assert done == []


def test_a_cuda_build_with_a_gpu_is_wanted(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = answers(setup, monkeypatch, {"torch==2.13.0": {"install": [{"metadata": CUDA_METADATA}]}})
    setup.install_torch(tmp_path, "torch==2.13.0", gpu=True, clock=setup.Clock())
    assert done == [["--no-deps", "torch==2.13.0"]]


def test_cuda_packages_in_the_environment_are_refused(setup: ModuleType, tmp_path: Path) -> None:
    distribution(tmp_path, "click")
    setup.refuse_cuda(tmp_path)
    distribution(tmp_path, "nvidia-cublas")
    with pytest.raises(setup.SetupError, match=r"nvidia-cublas(?s:.)*hint: "):
        setup.refuse_cuda(tmp_path)


@pytest.mark.parametrize(
    ("code", "listing", "expected"), [(0, "GPU 0: H", True), (0, "", False), (9, "", False)]
)
def test_the_drivers_tool_decides_whether_there_is_a_gpu(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, code: int, listing: str, expected: bool
) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: "/bin/" + name)
    answer = subprocess.CompletedProcess(["nvidia-smi", "-L"], code, stdout=listing, stderr="")
    monkeypatch.setattr(setup.subprocess, "run", lambda *args, **kwargs: answer)
    assert setup.has_nvidia_gpu() is expected


@pytest.mark.parametrize("present", [True, False])
def test_without_the_tool_the_device_file_decides(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, present: bool
) -> None:
    device = tmp_path / "nvidia0"
    if present:
        device.touch()
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup, "GPU_DEVICES", (str(device),))
    assert setup.has_nvidia_gpu() is present


# ------------------------------------------------------------------------------------------ the environment's folder


def test_an_interrupted_installation_is_forgotten_and_whole_ones_stay(
    setup: ModuleType, tmp_path: Path
) -> None:
    whole, no_record, file_gone = (distribution(tmp_path, name) for name in ("click", "torch", "rich"))
    (no_record / "RECORD").unlink()
    (file_gone.parent / "rich.py").unlink()
    assert setup.installed(tmp_path) == {"click", "torch", "rich"}
    setup.repair(tmp_path, setup.Clock())
    assert setup.installed(tmp_path) == {"click"}
    assert whole.exists()


def test_a_usable_environment_is_kept_and_marked_unfinished(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keep = tmp_path / "keep"
    keep.touch()
    (tmp_path / "setup-stamp.json").touch()
    monkeypatch.setattr(setup, "answers", lambda python: True)
    setup.make_venv(tmp_path, setup.Clock())
    assert keep.exists()
    assert (tmp_path / "setup-unfinished").exists()
    assert not (tmp_path / "setup-stamp.json").exists()


def test_a_broken_environment_is_made_anew(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "rubbish").touch()
    made: list[Path] = []
    monkeypatch.setattr(setup, "create_venv", made.append)
    setup.make_venv(venv, setup.Clock())
    assert made == [venv]
    assert not (venv / "rubbish").exists()


def test_this_interpreter_answers_and_a_text_file_does_not(setup: ModuleType, tmp_path: Path) -> None:
    assert setup.answers(Path(sys.executable))
    assert not setup.answers(tmp_path / "missing")
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    assert not setup.answers(fake)


def test_pip_of_the_system_is_used_where_the_environment_has_none(setup: ModuleType, tmp_path: Path) -> None:
    assert setup.pip(tmp_path, "list")[:4] == [sys.executable, "-m", "pip", "--python"]
    distribution(tmp_path, "pip")
    assert setup.pip(tmp_path, "list")[0] == str(setup.venv_python(tmp_path))


# --------------------------------------------------------------------------------------------------- progress, errors


def test_progress_counts_what_is_found_and_what_is_installed(setup: ModuleType, tmp_path: Path) -> None:
    output = setup.PipOutput(tmp_path / "log")
    assert output.progress(0) == "starting"
    output.read(io.StringIO("Collecting click\n  Downloading click.whl\nCollecting rich\n"))
    assert output.progress(0) == "2 found; Collecting rich"
    output.read(
        io.StringIO("Installing collected packages: click, rich, torch\n  Attempting uninstall: rich\n")
    )
    assert output.progress(2) == "2 of 3 installed"
    assert (tmp_path / "log").read_text().count("\n") == 5


def test_a_failing_pip_is_reported_with_its_last_words(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", "print('ERROR: no space left'); raise SystemExit(1)"]
    monkeypatch.setattr(setup, "pip", lambda venv, *arguments: command)
    with pytest.raises(setup.SetupError, match=r"could not install torch\nERROR: no space left\n\nhint: "):
        setup.run_pip(tmp_path, ["torch"], task="torch", clock=setup.Clock())


def test_an_index_that_does_not_answer_is_told_from_one_without_the_build(setup: ModuleType) -> None:
    broken = "WARNING: Retrying (total=0) after connection broken by 'NewConnectionError'\n"
    missing = "ERROR: Could not find a version\nERROR: No matching distribution found for torch\n"
    assert setup.complaint(missing) == "No matching distribution found for torch"
    assert setup.complaint(broken + missing).endswith("for torch; an index could not be reached")
    assert setup.complaint("") == ""


def test_nothing_is_done_when_nothing_changed(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = finished(setup, project, ["dev"])
    monkeypatch.setattr(setup, "ROOT", project)
    monkeypatch.setattr(setup, "set_up", lambda *args: pytest.fail("it was set up again"))
    assert setup.main(["--venv", str(venv)]) == 0
    assert capsys.readouterr().out == ""


def test_a_failed_set_up_ends_with_exit_code_1_and_no_stamp(
    setup: ModuleType, monkeypatch: pytest.MonkeyPatch, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise setup.SetupError("the index is empty\n\nhint: fill it")

    monkeypatch.setattr(setup, "ROOT", project)
    monkeypatch.setattr(setup, "set_up", fail)
    assert setup.main(["--venv", str(project / ".venv")]) == 1
    assert "set-up failed: the index is empty\n\nhint: fill it" in capsys.readouterr().err
    assert not (project / ".venv" / "setup-stamp.json").exists()
