"""A small store to test with: what it is made from, and the teacher's answers that go into it."""

import random

import numpy as np

import cli  # noqa: F401  binds offline_bkd to this checkout, also in processes that tests start
from offline_bkd.cache import CacheError, CropFlip, Identity, create_cache, open_cache

CLASSES = "apple", "aquarium fish", "baby", "bear", "beaver"
COUNTS = 120, 101, 100, 20, 19  # many, many, medium, medium, few


def identity(**changes) -> Identity:
    values = {
        "classes": CLASSES,
        "temperature": 2.0,
        "views": CropFlip(pad=1),
        "dataset": {"name": "fruit", "digests": {"labels": "aa", "images": "bb"}},
        "teacher": {"digest": "cc", "architecture": "resnet8"},
    }
    return Identity(**{**values, **changes})


TWO_VIEWS = {"identity": identity(views=CropFlip(pad=0))}


def arguments(**changes) -> dict:
    """What `create_cache` takes, for 360 samples in five classes and 18 views."""
    label = np.repeat(np.arange(len(COUNTS)), COUNTS)
    count = len(label)
    values = {
        "identity": identity(),
        "sample_id": np.arange(count) * 7 + 3,
        "label": np.random.default_rng(0).permutation(label),
        "image_size": np.tile([8, 8], (count, 1)),
        "encoding": {"name": "probability", "dtype": "float32"},
    }
    return {**values, **changes}


def answers(view: int, count: int = 360, classes: int = len(CLASSES)) -> np.ndarray:
    """The teacher's probabilities for `view`, float32 [N, C]: the same at every call."""
    logits = np.random.default_rng(view).normal(0, 3, (count, classes))
    logits -= logits.max(1, keepdims=True)
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


def fill(writer, blocks=None, answers=answers) -> None:
    """Write `blocks` (all pending ones by default)."""
    for view, block in writer.pending() if blocks is None else blocks:
        writer.write(view, block, answers(view)[writer.rows(block)])


def dump(url, answers=answers, **changes):
    """A whole store at `url`, opened."""
    with create_cache(url, **arguments(**changes)) as writer:
        fill(writer, answers=answers)
    return open_cache(url)


def files(folder) -> dict[str, bytes]:
    """Every file of a store but its lock, by key."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {key: path.read_bytes() for key, path in found.items() if key != "done/lock"}


def flip(path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def flips(folder, count: int, beginning: str = ""):
    """Flips `count` random bits of the files whose keys have this `beginning`, each file as likely as any other.

    One after the other: yields which, and puts it back.
    """
    keys, chance = sorted(key for key in files(folder) if key.startswith(beginning)), random.Random(0)
    for _ in range(count):
        path = folder / chance.choice(keys)
        place = path, chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(*place)
        yield place
        flip(*place)


def problems(url) -> list[str]:
    """What a reader finds wrong with a store: by opening it, or by its checksums."""
    try:
        return open_cache(url).verify_checksums()
    except CacheError as error:
        return [str(error)]
