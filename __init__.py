"""A teacher's predictions, computed once and kept; then any number of students trained from them."""

from importlib import import_module

PLACES = {"open_cache": ".cache"}  # imported when first asked for: reading a cache needs no torch, and help nothing at all

__all__ = [*PLACES]


def __getattr__(name: str):
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name], __name__), name)
