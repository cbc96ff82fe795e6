"""A teacher's predictions, computed once and kept; then any number of students trained from them."""

from importlib import import_module
from typing import Any

PLACES = {  # imported when first asked for: reading a cache needs no torch, and help nothing at all
    "open_cache": ".cache",
    "dump": ".pipeline.dump",
    "CachedTargets": ".pipeline.cached_targets",
    "ViewCrop": ".pipeline.cached_targets",
    "bkd_loss": ".pipeline.cached_targets",
}

__all__ = [*PLACES]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name], __name__), name)
