"""How an exported graph is run, as code for its card."""

from __future__ import annotations

from addenda.bases.stepwise import CachedDecoder
from addenda.export.job import Job

__all__ = ["usage"]

_OPEN = """import numpy
import onnxruntime

session = onnxruntime.InferenceSession("this folder/model.onnx")
"""
_ADAPTER = """adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
adapter.Load("this folder/{name}.onnx_adapter")  # keep it as long as the options are used
options.add_active_adapter(adapter)  # or leave the options out for the base
"""
_CHAT = """from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
messages = [{"role": "user", "content": "Where is my parcel?"}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
ids, stop = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id
"""
_TEXT = """from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("this folder")
ids, stop = tokenizer("Water boils at")["input_ids"], tokenizer.eos_token_id
"""
_IDS = """ids, stop = [1, 2, 3], None  # of your tokenizer
"""
_DECODE = """
past = [each for each in session.get_inputs() if each.name.startswith("past")]
cache = {{each.name: numpy.zeros((1, each.shape[1], 0, each.shape[3]), "float32") for each in past}}
answer, read = [], 0
while len(answer) < 64:
    total = read + len(ids)
    inputs = {{"input_ids": numpy.array([ids]), "attention_mask": numpy.ones((1, total), "int64"), **cache}}{places}
    logits, *cache = session.run(None, inputs{options})
    cache, read = dict(zip((each.name for each in past), cache)), total
    ids = [int(logits[0, -1].argmax())]
    if ids == [stop]:
        break
    answer += ids
"""
_PLACES = """
    inputs["position_ids"] = numpy.arange(read, total)[None]"""
_RUN = """
inputs = {{{inputs}}}  # any batch
[output] = session.run(None, inputs{options})
"""


def usage(job: Job, *, adapter: str = "") -> str:
    """Return Markdown with Python that runs the graph.

    Args:
        job: as exported.
        adapter: name of the adapter whose file lies beside the graph; empty where it is inside.
    """
    options = ", options" if adapter else ""
    code = _OPEN + (_ADAPTER.format(name=adapter) if adapter else "")
    if job.probes.kind == "next-token":
        template = job.base.chat_template if job.base else None
        code += _IDS if job.base is None else _TEXT if template is None else _CHAT
        code += _DECODE.format(
            options=options, places=_PLACES if CachedDecoder(job.model).takes_positions else ""
        )
        code += "print(tokenizer.decode(answer))\n" if job.base else ""
    else:
        row = job.probes.rows[0].items()
        made = (f'"{name}": numpy.ones({tuple(t.shape)}, "{str(t.dtype)[6:]}")' for name, t in row)
        code += _RUN.format(inputs=", ".join(made), options=options)
    return f"```python\n{code}```"
