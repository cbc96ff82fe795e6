"""A teacher's predictions, computed once and kept; then any number of students trained from them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the types of what is imported late
    from .cache import open_cache as open_cache
    from .pipeline.cached_targets import CachedTargets as CachedTargets
    from .pipeline.cached_targets import ViewCrop as ViewCrop
    from .pipeline.cached_targets import bkd_loss as bkd_loss
    from .pipeline.dump import dump as dump

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
