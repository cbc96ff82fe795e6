"""The store of a teacher's answers: written once block by block, read by anyone. NumPy and Zarr, no torch.

from cache import open_cache
open_cache("store.zarr").to_pandas(view=3)
"""

from cache.format import CacheError, CorruptCacheError, Identity
from cache.planes import Planes
from cache.reader import Cache, open_cache
from cache.views import CropFlip, RandomResizedCrop
from cache.writer import CacheWriter, create_cache

__all__ = [
    "Cache",
    "CacheError",
    "CacheWriter",
    "CorruptCacheError",
    "CropFlip",
    "Identity",
    "Planes",
    "RandomResizedCrop",
    "create_cache",
    "open_cache",
]
