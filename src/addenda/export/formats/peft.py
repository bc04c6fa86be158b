"""A folder that PEFT loads unchanged."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from addenda.bases import LoadedBase
from addenda.bases.registry import find
from addenda.core.planning import Plan
from addenda.core.whole import is_whole
from addenda.export.format import Format
from addenda.export.job import Job
from addenda.export.peft import write_peft
from addenda.export.peft.folder import layers_without
from addenda.export.peft.form import form_for
from addenda.export.runtime import Runtime
from addenda.export.runtimes.peft import open_peft

__all__ = ["FORMAT", "PEFTFolder"]

_HUB = """
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({source!r})
model = PeftModel.from_pretrained(base, "this folder")
"""

_REGISTERED = """
import addenda
from peft import PeftModel

base = addenda.load_base({source!r})
model = PeftModel.from_pretrained(base.model, "this folder")
"""

_MODULE = """
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this folder")  # base: the module that it was trained on
"""

_MIXED = """
config = PeftConfig.from_pretrained("this folder")
config.adapters = {{{{name: "this folder/" + name for name in config.adapters}}}}
{model}.config.use_cache = False
model = PeftModel.from_pretrained({model}, "this folder", config=config)
"""


class PEFTFolder(Format):
    """Configuration and tensors under PEFT's names, for every method that PEFT has."""

    library = "peft"

    def problems(self, planned: Plan, model: nn.Module, base: LoadedBase | None) -> list[str]:
        method, form = planned.method, form_for(planned.method)
        if form is None:
            return [f"PEFT has no method '{method.name}'"]
        own = [row.path for row in planned.rows if not is_whole(method, row.path)]
        found = []
        if planned.through is not None:
            found.append(
                f"PEFT adds to the weight as it is, and what is trained through {planned.through} to a rounded one"
            )
        if other := layers_without(form, model, own):
            found.append(
                f"PEFT's {form.peft_type} has no form for {len(other)} of the layers, first '{other[0]}'"
            )
        if method.whole and "modules_to_save" in form.unknown:
            found.append(f"PEFT's {form.peft_type} has no modules_to_save")
        return found

    def write(self, job: Job, folder: Path) -> None:
        source, _, revision = _source(job)
        write_peft(job.handle, folder, base_name=source or None, revision=revision or None)
        if job.base:
            job.base.tokenizer.save_pretrained(folder)

    def open(self, job: Job, folder: Path, *, exact: bool) -> Runtime:
        return open_peft(job.handle, folder)

    def usage(self, job: Job) -> str:
        source, registered, _ = _source(job)
        text = _REGISTERED if registered else _HUB if source else _MODULE
        if job.handle.method.mixes():
            before, _, _ = text.partition("model = PeftModel")
            before = before.replace("import PeftModel", "import PeftConfig, PeftModel")
            text = before + _MIXED.format(model="base.model" if registered else "base")
        return f"```python\n{text.format(source=source).strip()}\n```" + _served(job, source)


def _served(job: Job, source: str) -> str:
    """How vLLM serves the folder, where it can: low-rank updates alone, of a base that it can load by its name."""
    ranks = [len(term[0]) for each in job.handle.adapters.values() if (term := each.low_rank_term())]
    if (
        len(ranks) < len(job.handle.paths)
        or job.handle.method.name != "lora"
        or find(job.title)
        or not source
    ):
        return ""
    most = max(ranks)
    return (
        f"\n\n```sh\nvllm serve {source} --enable-lora --max-lora-rank {max(8, 1 << (most - 1).bit_length())} \\\n"
        f"  --lora-modules {job.handle.name}=FOLDER\n```"
    )


def _source(job: Job) -> tuple[str, str, str]:
    """What PEFT should load as the base, whether it is a name of ours (or empty), and its revision."""
    if job.base is None:
        return "", "", ""
    registered = job.base.name if find(job.base.name) else ""
    source, _, revision = (registered or job.base.source).partition("@")
    return source, registered, revision


FORMAT = PEFTFolder()
