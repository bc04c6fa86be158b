"""Does this bundle answer here as the model that was trained? Needs Python and llama.cpp's llama-server, nothing else.

    python selftest.py --llama-server PATH [--base BASE.gguf]     starts the server itself
    python selftest.py --server http://127.0.0.1:8080             asks one that runs, with the adapter loaded

Prints a line for each file and one for the answers; exit status 0 if all is well, else 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FORCED = 100.0  # keeps the server from writing a token that ends the answer; what it tells is from before


def damaged(manifest: dict[str, Any]) -> Iterator[str]:
    """Yield the files that are not those that were bundled."""
    for name, known in manifest["sha256"].items():
        path = HERE / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != known:
            yield name


def ask(server: str, path: str, body: dict[str, Any]) -> Any:
    """Post JSON, return the JSON that comes back."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def compare(server: str, rows: list[Any]) -> tuple[float, float]:
    """Return KL (nats a position, over the tokens that were kept) and the share of equal first choices."""
    kl, same, count = 0.0, 0, 0
    for row in rows:
        for at, kept in enumerate(row["likeliest"], start=1):
            body = {"prompt": row["ids"][:at], "n_predict": 1, "n_probs": 512, "cache_prompt": True,
                    "logit_bias": [[row["letter"], FORCED]], "samplers": ["top_k"], "top_k": 1}  # fmt: skip
            listed = ask(server, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
            told = {each["id"]: each["logprob"] for each in listed}
            least = min(told.values())
            kl += sum(math.exp(p) * (p - told.get(token, least)) for token, p in kept)
            same += listed[0]["id"] == kept[0][0]
            count += 1
    return kl / count, same / count


def started(arguments: argparse.Namespace, manifest: dict[str, Any]) -> tuple[subprocess.Popen[bytes], str]:
    """Start llama-server on the bundle's files; return the process and its address."""
    port, files = "8199", manifest["llama_cpp"]
    model = HERE / files["model"] if "model" in files else Path(arguments.base or HERE / "base.gguf")
    if not model.is_file():
        sys.exit(
            f"the base's GGUF file is not here: give --base FILE (sha256 {manifest['base_gguf_sha256']})"
        )
    command = [arguments.llama_server, "-m", str(model), "--port", port]
    command += ["--lora", str(HERE / files["adapter"])] if "adapter" in files else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        try:
            urllib.request.urlopen(address + "/health", timeout=5).close()
            return process, address
        except OSError:
            time.sleep(0.5)
    process.kill()
    sys.exit("llama-server did not start")


def main() -> int:
    """Check the files, then the answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server")
    parser.add_argument("--llama-server", default="llama-server")
    parser.add_argument("--base")
    arguments = parser.parse_args()
    manifest = json.loads((HERE / "bundle.json").read_text(encoding="utf-8"))
    wrong = list(damaged(manifest))
    print(f"files: {len(manifest['sha256'])} checked, damaged: {', '.join(wrong) or 'none'}")
    process, address = (None, arguments.server) if arguments.server else started(arguments, manifest)
    try:
        kl, same = compare(address, json.loads((HERE / "selftest.json").read_text(encoding="utf-8"))["rows"])
    finally:
        if process:
            process.kill()
    limits = manifest["limits"]
    well = kl <= limits["kl"] and same >= limits["top1"]
    least = f"at most {limits['kl']:.2g}", f"at least {limits['top1']:.1%}"
    print(f"answers: KL {kl:.2g} nats ({least[0]}), same first choice {same:.1%} ({least[1]})")
    return 0 if well and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
