"""Recipe: train a student from a cache, with no teacher."""

import torch

from cache import Cache, CacheError, open_cache
from pipeline import UserError, runs
from pipeline.config import Experiment
from pipeline.data import datasets
from pipeline.dump import refuse_other
from pipeline.methods import needs_cache
from pipeline.recipe import train_network


def train_student(config: Experiment, cache_path: str | None, out: str, device: torch.device, resume: bool = False) -> None:
    """Trains the student of `config` from the cache at `cache_path` into the folder `out`.

    Raises CacheError before anything is written if the cache is for other data, views or classes, or is not complete.
    """
    runs.refuse_taken(out, resume)
    method = config.student.method
    if needs_cache(method) and cache_path is None:
        raise UserError(f"method {method.name} learns from a cache; name one with --cache")
    if not needs_cache(method) and cache_path is not None:
        raise UserError(f"method {method.name} learns from no cache; leave out --cache")
    sets = datasets.load(config.data)
    cache = cache_path and open_matching_cache(cache_path, config, sets[0])
    train_network(config, "student", method, sets, cache, out, device, resume)


def open_matching_cache(path: str, config: Experiment, training_set: datasets.Dataset) -> Cache:
    """The complete cache at `path`. Raises CacheError with every difference if it is not for this experiment."""
    cache = open_cache(path)
    refuse_other(cache, path, training_set, config.cache.temperature, config.views, cache.identity.teacher)
    if missing := len(cache.missing()):
        raise CacheError(f"{path} lacks {missing} blocks; finish it with dump-logits --resume")
    return cache
