"""Set up the development environment: ``.venv`` with the pinned packages and this project, editable.

Run by ``make setup`` with the system's Python; needs only the standard library, pip and a package index.
Nothing is done when nothing changed. After an interrupted set-up, half-installed packages are installed again.
On a machine without an NVIDIA GPU no CUDA build of PyTorch is ever installed: the CPU build is gigabytes smaller
and all that such a machine can use.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")
CUDA_PREFIXES = ("nvidia-", "cuda-")
HEARTBEAT_SECONDS = 5.0


class SetupError(Exception):
    """Set-up cannot go on; the text says why and what to do."""


class Clock:
    """Print one line per event with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def say(self, text: str) -> None:
        """Print ``text`` behind the elapsed time, at once."""
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)


# ------------------------------------------------------------------------------------------- what is needed


def fingerprint(root: Path, python: str = sys.version) -> str:
    """Return the SHA-256 of everything the environment depends on."""
    digest = hashlib.sha256(python.encode())
    for name in ("pyproject.toml", "constraints.txt", "tools/setup.py"):
        content = (root / name).read_bytes()
        digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def is_current(venv: Path, digest: str, extras: set[str]) -> bool:
    """Tell whether a finished set-up of the same inputs, with at least these extras, stands in ``venv``."""
    try:
        stamp = json.loads((venv / "setup-stamp.json").read_text())
    except (OSError, ValueError):
        return False
    return (
        stamp.get("digest") == digest
        and extras <= set(stamp.get("extras", []))
        and venv_python(venv).exists()
        and not (venv / "setup-unfinished").exists()
    )


def torch_requirement(constraints: str) -> str:
    """Return the exact ``torch==X`` pin of a constraints file's text."""
    found = re.search(r"^torch==([\w.]+)\s*$", constraints, flags=re.MULTILINE)
    if not found:
        raise SetupError("constraints.txt pins no torch\n\nhint: add a line 'torch==X.Y.Z'")
    return f"torch=={found.group(1)}"


def has_nvidia_gpu() -> bool:
    """Tell whether an NVIDIA GPU answers on this machine, by its driver's tool or by its device file."""
    if shutil.which("nvidia-smi"):
        try:
            answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return answer.returncode == 0 and "GPU" in answer.stdout
    return any(os.path.exists(device) for device in GPU_DEVICES[:2])


def torch_candidates(pin: str, *, gpu: bool, platform: str) -> list[tuple[list[str], str]]:
    """Return (pip arguments, words) in the order to try them.

    The plain pin comes last on Linux without a GPU: there it usually names a CUDA build, and older pips would
    download gigabytes only to look at it. It is tried all the same, for an index that serves a CPU build under
    the plain version, and refused by :func:`cuda_packages` if it is none.
    """
    plain = ([pin], f"{pin} from the configured index")
    if gpu or not platform.startswith("linux"):
        return [plain]
    cpu = f"{pin}+cpu"
    return [
        ([cpu], f"{cpu} from the configured index"),
        ([cpu, "--extra-index-url", CPU_INDEX, "--retries", "1"], f"{cpu} from PyTorch's own CPU index"),
        plain,
    ]


def cuda_packages(report: dict) -> list[str]:
    """Return what makes a pip installation report a CUDA one: NVIDIA packages installed or required."""
    names = set()
    for item in report.get("install", []):
        metadata = item["metadata"]
        wanted = [metadata["name"], *map(required_name, metadata.get("requires_dist", []))]
        names |= {name for name in wanted if name.lower().startswith(CUDA_PREFIXES)}
        version = metadata.get("version", "")
        if metadata["name"] == "torch" and "+cu" in version:
            names.add(f"torch {version}")
    return sorted(names)


def required_name(requirement: str) -> str:
    """Return the package name of a requirement line.

    Requirements for an extra, or for another system than this one, are not what would be installed.
    """
    name, _, marker = requirement.partition(";")
    foreign = "extra ==" in marker or ("Linux" in marker and not sys.platform.startswith("linux"))
    return "" if foreign else re.split(r"[\s<>=!~\[(]", name.strip(), maxsplit=1)[0]


# --------------------------------------------------------------------------------------------------- doing it


def venv_python(venv: Path) -> Path:
    """Return the interpreter inside ``venv``."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def metadata_folders(venv: Path) -> list[Path]:
    """Return the ``.dist-info`` folder of each distribution in ``venv``."""
    return [*venv.glob("lib/python*/site-packages/*.dist-info"), *venv.glob("Lib/site-packages/*.dist-info")]


def installed(venv: Path) -> set[str]:
    """Return the names of the distributions in ``venv``, read from its folders."""
    return {folder.name.split("-")[0].lower().replace("_", "-") for folder in metadata_folders(venv)}


def is_whole(folder: Path) -> bool:
    """Tell whether every file that a distribution's RECORD lists exists (compiled ones aside)."""
    try:
        rows = list(csv.reader((folder / "RECORD").read_text(encoding="utf-8").splitlines()))
    except OSError:
        return False
    return all((folder.parent / row[0]).exists() for row in rows if row and not row[0].endswith(".pyc"))


def repair(venv: Path, clock: Clock) -> None:
    """Forget the distributions that a killed pip left incomplete, so that pip installs them again."""
    broken = [folder for folder in metadata_folders(venv) if not is_whole(folder)]
    clock.say(f"the last set-up did not finish: {len(broken)} incomplete packages will be installed again")
    for folder in broken:
        shutil.rmtree(folder)


def make_venv(venv: Path, clock: Clock) -> None:
    """Create ``venv``, or keep a usable one and repair what an interrupted set-up left."""
    unfinished = venv / "setup-unfinished"
    if not answers(venv_python(venv)):
        clock.say(f"creating {venv.name} with Python {sys.version.split()[0]}")
        shutil.rmtree(venv, ignore_errors=True)
        venv.mkdir(parents=True)
        unfinished.touch()
        create_venv(venv)
    elif unfinished.exists():
        repair(venv, clock)
    unfinished.touch()
    (venv / "setup-stamp.json").unlink(missing_ok=True)


def create_venv(venv: Path) -> None:
    """Create a virtual environment, with its own pip where Python brings one."""
    for options in ([], ["--without-pip"]):
        made = subprocess.run(
            [sys.executable, "-m", "venv", *options, str(venv)], capture_output=True, text=True
        )
        if made.returncode == 0:
            return
    raise SetupError(
        f"python cannot create a virtual environment\n{made.stderr or made.stdout}\n"
        "hint: install Python's venv module (on Debian and Ubuntu: apt install python3-venv)"
    )


def answers(python: Path) -> bool:
    """Tell whether this interpreter runs and is of the version that runs this script."""
    if not python.exists():
        return False
    probe = [str(python), "-c", "import sys; print(sys.version)"]
    answer = subprocess.run(probe, capture_output=True, text=True)
    return answer.returncode == 0 and answer.stdout.strip() == sys.version


def pip(venv: Path, *arguments: str) -> list[str]:
    """Return the command that runs pip for ``venv``: its own, or the system's pointed at it."""
    if "pip" in installed(venv):
        return [str(venv_python(venv)), "-m", "pip", *arguments]
    return [sys.executable, "-m", "pip", "--python", str(venv_python(venv)), *arguments]


class PipOutput:
    """What pip has said so far: all of it in a log file, its last lines here, and how far it has come."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.tail: deque[str] = deque(maxlen=15)
        self.collected = 0
        self.installing: int | None = None

    def read(self, lines: Iterable[str]) -> None:
        """Take lines until they end."""
        with self.log.open("a", encoding="utf-8") as file:
            for line in lines:
                file.write(line)
                file.flush()
                self.take(line.strip())

    def take(self, line: str) -> None:
        """Take one line."""
        if line and "is ignored: it is neither" not in line:
            self.tail.append(line)
        if line.startswith(("Collecting ", "Processing ", "Obtaining ")):
            self.collected += 1
        if line.startswith("Installing collected packages: "):
            self.installing = line.count(",") + 1

    def progress(self, new: int) -> str:
        """Say in a few words how far pip is; ``new`` is the number of packages added to the environment."""
        if self.installing is not None:
            return f"{min(new, self.installing)} of {self.installing} installed"
        last = self.tail[-1] if self.tail else "starting"
        return f"{self.collected} found; {last[:80]}" if self.collected else last[:80]


def run_pip(venv: Path, arguments: list[str], *, task: str, clock: Clock) -> None:
    """Run ``pip install`` with counted progress; on failure raise with the end of pip's output."""
    command = pip(venv, "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments)
    output, before = PipOutput(venv / "setup.log"), installed(venv)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    ) as process:
        reader = threading.Thread(target=output.read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            while reader.is_alive():
                reader.join(HEARTBEAT_SECONDS)
                if reader.is_alive():
                    clock.say(f"  {task}: {output.progress(len(installed(venv) - before))}")
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode:
        end = "\n".join(output.tail)
        raise SetupError(f"pip could not install {task}\n{end}\n\nhint: the full output is in {output.log}")


def resolve(venv: Path, arguments: list[str]) -> tuple[dict | None, str]:
    """Return pip's installation report for ``arguments`` without installing, or None and pip's last line."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "report.json")
        options = ["--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", str(target)]
        command = pip(venv, "install", "--disable-pip-version-check", *options, *arguments)
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode or not target.exists():
            return None, complaint(answer.stderr) or f"pip ended with exit code {answer.returncode}"
        return json.loads(target.read_text()), ""


def complaint(stderr: str) -> str:
    """Return the last error line of pip's output, and whether an index did not answer at all."""
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    unreachable = ["an index could not be reached"] if "connection broken by" in stderr else []
    return "; ".join([*errors[-1:], *unreachable])


def install_torch(venv: Path, pin: str, *, gpu: bool, clock: Clock) -> None:
    """Install the pinned PyTorch in the build that suits the machine, without its dependencies.

    Raises:
        SetupError: no index serves one, or only CUDA builds are served and there is no GPU.
    """
    refused = []
    for arguments, words in torch_candidates(pin, gpu=gpu, platform=sys.platform):
        report, problem = resolve(venv, arguments)
        if report is None:
            clock.say(f"  {words}: {problem}")
            refused.append(f"{words}: {problem}")
            continue
        cuda = [] if gpu else cuda_packages(report)
        if cuda:
            clock.say(f"  {words}: refused, a CUDA build and no NVIDIA GPU here")
            refused.append(
                f"{words}: a CUDA build (it brings {', '.join(cuda[:3])}), and no NVIDIA GPU answers"
            )
            continue
        clock.say(f"installing {words}")
        run_pip(venv, ["--no-deps", *arguments], task="torch", clock=clock)
        return
    raise SetupError(
        f"no suitable build of {pin} was found\n  "
        + "\n  ".join(refused)
        + f"\n\nhint: put the wheel of '{pin}+cpu' on the configured index, or let this machine reach {CPU_INDEX}"
    )


def refuse_cuda(venv: Path) -> None:
    """Raise if NVIDIA's packages got into ``venv`` all the same."""
    found = sorted(name for name in installed(venv) if name.startswith(CUDA_PREFIXES))
    if found:
        raise SetupError(
            f"CUDA packages were installed on a machine without an NVIDIA GPU: {', '.join(found[:5])}\n\n"
            f"hint: remove {venv} and run 'make setup' again; if it recurs, see which package asks for them: "
            "pip show " + found[0]
        )


def set_up(venv: Path, extras: set[str], clock: Clock) -> None:
    """Bring ``venv`` to the pinned state; leave the stamp only when everything is in place."""
    make_venv(venv, clock)
    gpu = has_nvidia_gpu()
    clock.say(
        "an NVIDIA GPU answers: PyTorch with CUDA" if gpu else "no NVIDIA GPU answers: PyTorch for the CPU"
    )
    constraints = (ROOT / "constraints.txt").read_text()
    pin = torch_requirement(constraints)
    install_torch(venv, pin, gpu=gpu, clock=clock)
    project = f"{ROOT}[{','.join(sorted(extras))}]"
    clock.say(f"installing the project and its packages ({', '.join(sorted(extras))})")
    arguments = ["--constraint", str(ROOT / "constraints.txt"), "--editable", project]
    run_pip(venv, arguments, task="packages", clock=clock)
    if not gpu:
        refuse_cuda(venv)
    stamp = {"digest": fingerprint(ROOT), "extras": sorted(extras)}
    (venv / "setup-stamp.json").write_text(json.dumps(stamp))
    (venv / "setup-unfinished").unlink()


def main(arguments: list[str] | None = None) -> int:
    """Set up, or say that nothing changed; return the exit code."""
    parser = argparse.ArgumentParser(description="Set up .venv with the pinned packages and this project.")
    parser.add_argument("--extra", action="append", default=[], help="an extra besides 'dev', e.g. bench")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the folder (default: .venv)")
    options = parser.parse_args(arguments)
    if sys.version_info < OLDEST_PYTHON:
        print(
            f"Python {sys.version.split()[0]} is too old\n\nhint: make PYTHON=python3.11 setup",
            file=sys.stderr,
        )
        return 1
    clock, extras = Clock(), {"dev", *options.extra}
    if is_current(options.venv, fingerprint(ROOT), extras):
        return 0
    try:
        set_up(options.venv, extras, clock)
    except SetupError as error:
        print(f"\nset-up failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up interrupted; the next 'make setup' repairs it", file=sys.stderr)
        return 130
    clock.say(f"set-up is complete: {options.venv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
