"""The properties that make something a method, tried on every layer it says it can stand on.

Every method of this package passes them, and one from outside is held to them in the same way: by its registered
name, ``python -m addenda.conformance my-method``, or by two lines in a test file::

    from addenda.conformance.test_methods import *
    METHODS = ["my-method"]

A method that changes the sequence takes ``test_sequence`` in place of ``test_methods``. Nothing else in the package
imports this room, which needs pytest (the extra ``conformance``).
"""

from __future__ import annotations
