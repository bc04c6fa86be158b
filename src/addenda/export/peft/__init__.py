"""PEFT's adapter folder, written and read; the only room that knows PEFT's names.

Layout (peft 0.21): ``adapter_config.json`` and ``adapter_model.safetensors`` with the keys
``base_model.model.<layer path>.<a name of the method's>``. ``forms/`` has one file for each method that PEFT has too.

What is read is literal: no regular expression from a file is ever run, no pickle opened, and ``auto_mapping``, which
names a class to import, is not looked at.
"""

from __future__ import annotations

from addenda.export.peft.folder import write_peft
from addenda.export.peft.form import CONFIG, TENSORS
from addenda.export.peft.reading import import_peft, read_config

__all__ = ["CONFIG", "TENSORS", "import_peft", "read_config", "write_peft"]
