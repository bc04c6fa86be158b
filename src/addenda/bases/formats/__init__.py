"""Packed weight formats: how the bytes of a quantised weight become numbers; one file for each family."""

from __future__ import annotations

from addenda.bases.formats.registry import Grid, WeightFormat, find, get, names, register

__all__ = ["Grid", "WeightFormat", "find", "get", "names", "register"]
