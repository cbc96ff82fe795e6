"""Is a cache what its teacher answers? Some views are computed again and compared."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from offline_bkd.cache import Cache, CacheError, open_cache, philox
from offline_bkd.cache.features import MAX_ERROR, decode
from offline_bkd.cache.shots import shot_groups
from offline_bkd.cache.target import class_weight, total_variation
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.schema import PIXELS, Experiment
from offline_bkd.pipeline.teachers import average, load_teachers, refuse_other, tempered

ROUNDING = 0.005  # a fresh forward pass on another device or with other batches rounds differently, more so in bfloat16


def verify_cache(
    path: str, teachers: Sequence[str], views: int, tolerance: float | None, overrides: tuple, device: torch.device
) -> dict:
    """Compares `views` views of the cache, chosen by its teacher's digest, with fresh answers of the teacher.

    The error is the total variation of the BKD target, stored from fresh, a mean over samples. Returns mean and worst,
    by shot group and by class, the mean cosine distance of features, and whether the mean of every block is within
    `tolerance` (default: what the encoding promises, and rounding), and that of features within what theirs promises.
    """
    run = runs.open_run(teachers[0])
    config = run.config(overrides)
    if changed := runs.difference(_without_place(run.config()), _without_place(config)):
        raise UserError(
            f"{path} is verified as it was dumped, but {changed}; "
            "-o may say where the training images are (data), cache.precision and cache.batch_size"
        )
    training_set, _, _ = datasets.load(config.data)
    cache = open_cache(path)
    teachers = _as_dumped(cache, teachers)
    teacher, identities = load_teachers(teachers, training_set, features=bool(cache.features))
    names = [Path(folder).resolve().name for folder in teachers]
    if cache.features and set(names) != set(cache.features):
        raise UserError(
            f"{path} holds features of teachers whose folders are named {', '.join(sorted(cache.features))}; "
            f"found {', '.join(sorted(names))}; name the folders as they were"
        )
    identity = average(identities)
    refuse_other(cache, path, training_set, temperature=cache.temperature, views=cache.views, teacher=identity)
    images = open_images(training_set, cache.views, device, config.data.workers)
    views_there, blocks = np.unique([view for view, _ in cache.committed()], return_counts=True)
    dumped = views_there[blocks == cache.layout.blocks].astype(int).tolist()
    if not dumped:
        raise CacheError(f"{path} has no complete view to verify; finish it with dump-logits --resume")
    order = philox.permutation(int(identity["digest"][:16], 16), philox.VIEW, np.array(dumped))
    chosen = [dumped[index] for index in order[:views]]
    settings = config.cache.model_copy(update={"temperature": cache.temperature})
    if not {"cache", "cache.precision"} & {override.partition("=")[0] for override in overrides}:  # else it was asked for
        settings = settings.model_copy(update={"precision": cache.identity.computed.get("precision", settings.precision)})
    teacher.to(device)
    found = _compare(
        cache, chosen, names, lambda rows, view: tempered(teacher, images, rows, np.full(len(rows), view), settings)
    )
    worst = max(found.blocks, key=lambda block: (np.isnan(block.error), block.error))
    by_sample = found.error.mean(0)
    by_class = np.bincount(training_set.label, by_sample, len(cache.classes)) / training_set.class_counts
    limit = tolerance if tolerance is not None else ROUNDING + (cache.encoding.max_error or 0)
    return {
        "views": chosen,
        "missing_blocks": cache.missing_blocks,
        "mean": float(found.error.mean()),
        "worst": float(found.error.max()),
        "worst_block": {"mean": worst.error, "view": worst.view, "rows": worst.rows},
        "tolerance": limit,
        "passed": all(block.error <= limit and all(one <= MAX_ERROR for one in block.distances) for block in found.blocks),
        "features": {name: float(distance.mean()) for name, distance in found.distance.items()},
        "shots": {
            group: float(by_class[members].mean())
            for group, members in shot_groups(training_set.class_counts).items()
            if members.any()
        },
        "classes": dict(zip(cache.classes, by_class.tolist())),
    }


class _Block(NamedTuple):
    """What was found of a block, which the encoding's promise is of."""

    error: float  # mean over its samples
    view: int
    rows: list[int]  # the first, and the one after the last
    distances: list[float]  # of each teacher's features, means


class _Found(NamedTuple):
    """What was found of V views of N samples."""

    error: np.ndarray  # float64 [V, N], total variation of the BKD target
    distance: dict[str, np.ndarray]  # of each teacher's features, float64 [V, N], 1 - cosine
    blocks: list[_Block]


def _compare(
    cache: Cache,
    views: list[int],
    names: list[str],
    answer: Callable[[np.ndarray, int], tuple[torch.Tensor, list[torch.Tensor]]],
) -> _Found:
    """Compares `views` of the cache with what teachers of `names` answer now about `rows` under a view."""
    samples, weight = np.arange(len(cache)), class_weight(cache.class_counts)
    error = np.zeros((len(views), len(samples)))
    distance = {name: np.zeros_like(error) for name in cache.features}
    blocks = []
    for index, view in enumerate(views):
        vectors_kept = {name: cache.stored_feature_plane(name, view) for name in cache.features}
        for block in range(cache.layout.blocks):  # of all samples at once memory might not hold the answers
            rows = samples[cache.layout.rows(block)]
            fresh, vectors = answer(rows, view)
            stored = cache.held.decode(cache.stored_block(view, block))
            error[index, rows] = total_variation(fresh.mean(1).cpu().numpy(), stored, weight)
            for name, vector in zip(names, vectors):
                cosine = functional.normalize(vector.cpu()).numpy() * decode(vectors_kept[name][rows])
                distance[name][index, rows] = 1 - cosine.sum(1)
            mean, *distances = (float(one[index, rows].mean()) for one in (error, *distance.values()))
            blocks.append(_Block(mean, view, [int(rows[0]), int(rows[-1]) + 1], distances))
    return _Found(error, distance, blocks)


def _without_place(config: Experiment) -> dict:
    """What `config` says but for which data it reads, which are compared with the cache's, and how the teacher is run."""
    values = config.model_dump(mode="json", exclude={"cache": {"precision", "batch_size"}})
    return {**values, "data": config.data.model_dump(mode="json", include=PIXELS)}  # the teacher has its own


def _as_dumped(cache: Cache, teachers: Sequence[str]) -> list[str]:
    """The folders `teachers` in the order in which the cache was dumped from them, which its digest depends on."""
    kept = cache.identity.teacher
    order = [one["digest"] for one in kept.get("experts", kept.get("average_of", []))]
    place = {folder: runs.open_run(folder).summary()["digest"] for folder in teachers}
    return sorted(teachers, key=lambda folder: order.index(place[folder]) if place[folder] in order else len(order))
