"""Leaner forms of the parts that most transformers share; one kind of part a file.

Where matrix units make products nearly free, a training step spends its time and memory on what lies between them. The
forms here take fewer passes over the data and keep only what the backward cannot make again. Each has a kernel in
machine code and a twin in plain PyTorch, equal within rounding.

A module is recognised by what it holds and proven by what it computes, never by the model's name.
"""
