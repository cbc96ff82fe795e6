"""The store of a teacher's answers: written once block by block, read by anyone. NumPy and Zarr, no torch.

from . import open_cache
open_cache("store.zarr").to_pandas(view=3)
"""

from .format import CacheError, CorruptCacheError, Identity, LostCacheError
from .reader import Cache, open_cache
from .views import CropFlip, RandomResizedCrop
from .writer import CacheWriter, create_cache

__all__ = [
    "Cache",
    "CacheError",
    "CacheWriter",
    "CorruptCacheError",
    "CropFlip",
    "Identity",
    "LostCacheError",
    "RandomResizedCrop",
    "create_cache",
    "open_cache",
]
