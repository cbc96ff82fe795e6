"""Format 1 never changes: stores that an older version wrote are read for ever, bit by bit.

`python tests/test_cache_format.py` wrote them, once.
"""

from pathlib import Path

import numpy as np
import pytest
from cache_store import files

from offline_bkd.cache import CropFlip, Identity, RandomResizedCrop, create_cache, open_cache

STORES = Path(__file__).parent / "format-1"
SAMPLES, CLASSES = 24, ("chat", "chien", "élan", "hibou")
ENCODINGS = {
    "float16": {"name": "probability", "dtype": "float16"},
    "float32": {"name": "probability", "dtype": "float32"},
    "klt": {"name": "klt", "max_error": 0.02},
}


def probability(view):
    """Probabilities that need no random numbers: small integers over their sum, float32 [24, 4]."""
    weight = 1 + (np.arange(SAMPLES)[:, None] * (7 + view) + np.arange(4) * (11 + 3 * view)) % 29
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def dump(url, encoding):
    views = RandomResizedCrop(size=8, count=2, seed=3) if encoding == "float16" else CropFlip(pad=0)
    identity = Identity(
        classes=CLASSES, temperature=2.0, views=views, dataset={"name": "animaux"}, teacher={"digest": "0f", "depth": 8}
    )
    label = np.minimum(np.arange(SAMPLES) // 8, 3)
    columns = {"sample_id": np.arange(SAMPLES) * 5 + 2, "label": label, "image_size": np.full((SAMPLES, 2), 12)}
    fit = {"fit": lambda numbers: np.stack([probability(view) for view in numbers])}
    with create_cache(url, identity=identity, encoding=ENCODINGS[encoding], **columns, **fit) as writer:
        for view, block in writer.pending():
            writer.write(view, block, probability(view))


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_store_of_format_1_is_read(name):
    cache = open_cache(STORES / name)
    assert cache.complete and cache.verify_checksums() == [] and len(cache.to_pandas()) == 2 * SAMPLES
    assert cache.classes == CLASSES and cache.temperature == 2.0 and cache.sample_id[1] == 7
    assert cache.class_counts.tolist() == [8, 8, 8, 0]
    for view in range(2):
        plane, exact = cache.plane(view), probability(view)
        if name == "klt":
            omega = (1 - 0.9999) / (1 - 0.9999 ** np.maximum(cache.class_counts, 1))
            q, rebuilt = (p * omega / (p * omega).sum(1, keepdims=True) for p in (exact, plane))
            assert 0.5 * np.abs(q - rebuilt).sum(1).mean() <= 0.02
        else:
            assert (plane == exact.astype(name)).all()


def test_the_codes_of_a_store_of_format_1_are_those_that_were_written():
    codes = open_cache(STORES / "klt").stored_plane(1)
    assert codes[:3].tolist() == CODES and codes.sum(dtype=int) == CODE_SUM


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_todays_writer_writes_the_same_bytes(tmp_path, name):
    dump(tmp_path / "s", name)
    assert files(tmp_path / "s") == files(STORES / name)


CODES = [[12, 4, -48], [16, 0, -4], [-44, 16, 4]]
CODE_SUM = -32


if __name__ == "__main__":
    for each in ENCODINGS:
        dump(STORES / each, each)
        (STORES / each / "done/lock").unlink()
