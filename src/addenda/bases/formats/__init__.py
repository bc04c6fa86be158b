"""Packed weight formats: how the bytes of a quantised weight become numbers; one file for each family."""

from __future__ import annotations

from addenda.bases.formats.registry import WeightFormat, find, get, names, register

__all__ = ["WeightFormat", "find", "get", "names", "register"]
