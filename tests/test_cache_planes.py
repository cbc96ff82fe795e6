"""What may be asked of a store by view and sample, and that targets are held where no step touches it."""

import errno
import os
import re

import numpy as np
import pytest
import torch
from cache_store import answers, dump, identity

from offline_bkd.cache import CacheError, CropFlip
from offline_bkd.pipeline.training.targets import Targets


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return dump(tmp_path_factory.mktemp("planes") / "s")


def test_targets_are_held_without_the_store(tmp_path):
    cache = dump(tmp_path / "s", identity=identity(views=CropFlip(pad=0)))
    targets = Targets(cache, torch.device("cpu"))
    for path in sorted((tmp_path / "s").rglob("c.*")):
        path.unlink()
    samples, views = np.array([7, 0, 359, 7]), np.array([1, 0, 1, 0])
    expected = np.stack([answers(view)[sample] for sample, view in zip(samples, views, strict=False)])
    found = targets.probability(torch.from_numpy(samples), torch.from_numpy(views))
    assert (found.numpy() == expected).all()


def test_a_full_scratch_disk_is_one_line_and_not_the_end_of_the_process(cache, tmp_path, monkeypatch):
    from offline_bkd import CachedTargets

    asked, whole = [], 18 * 360 * 5 * 4  # bytes of all planes

    def full(_, start, size):
        asked.append((start, size))
        if size == whole:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)  # what is mapped without it is killed by SIGBUS when it is written
    with pytest.raises(CacheError, match="1 MB of planes find no place: No space left on device; name another scratch folder"):
        CachedTargets(cache, range(360), scratch=tmp_path)
    assert asked == [(0, 16), (0, whole)]


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda cache: cache.plane(1.5), "a view is a whole number, found 1.5"),
        (lambda cache: cache.plane(True), "a view is a whole number, found True"),
        (lambda cache: cache.plane(-1), "there is no view -1: the store has views 0 to 17"),
        (lambda cache: cache.stored_block(0, 1), "there is no block 1: the store has blocks 0 to 0"),
        (lambda cache: cache.stored_block(0, -1), "there is no block -1: the store has blocks 0 to 0"),
        (lambda cache: cache.rows([0.5], [0]), "a sample is a whole number, found [0.5]"),
        (lambda cache: cache.rows([0, -1], 0), "there is no sample -1: the store has samples 0 to 359"),
        (lambda cache: cache.rows([360], [0]), "there is no sample 360: the store has samples 0 to 359"),
        (lambda cache: cache.rows([0], [True]), "a view is a whole number, found [True]"),
        (lambda cache: cache.rows([0], [0.0]), "a view is a whole number, found [0.0]"),
        (lambda cache: cache.rows([0], [18]), "there is no view 18: the store has views 0 to 17"),
        (lambda cache: cache.rows([0], [-18]), "there is no view -18: the store has views 0 to 17"),
    ],
)
def test_numbers_that_are_no_views_or_samples_are_refused(cache, ask, message):
    with pytest.raises(CacheError, match=re.escape(message)):
        ask(cache)


def test_one_row_and_none_may_be_asked_for(cache):
    assert (cache.rows(np.int32(7), np.uint8(2)) == answers(2)[[7]]).all()
    assert cache.rows([], []).shape == (0, 5)
