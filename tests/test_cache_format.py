"""Format 1 never changes: stores that an earlier version wrote are read for ever, bit by bit.

tests/stores has a folder for each version that wrote some. `python tests/test_cache_format.py` wrote those of 0.1.0, once;
those of 0.1.0.dev0 are of before its default encoding was `logit`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache_store import files

from offline_bkd.cache import CropFlip, Identity, RandomResizedCrop, create_cache, format, open_cache

STORES = Path(__file__).parent / "stores"
OF = {path.relative_to(STORES).as_posix(): path for path in sorted(STORES.glob("*/*"))}
SAMPLES, CLASSES = 24, ("chat", "chien", "élan", "hibou")
ENCODINGS = {
    "logit": {"name": "logit"},
    "float16": {"name": "probability", "dtype": "float16"},
    "float32": {"name": "probability", "dtype": "float32"},
    "klt": {"name": "klt", "max_error": 0.02},
}
COMPUTED = {"precision": "float32", "device": "cpu", "environment": {"torch": "2.9.0"}}


def probability(view):
    """Probabilities that need no random numbers: small integers over their sum, float32 [24, 4]."""
    weight = 1 + (np.arange(SAMPLES)[:, None] * (7 + view) + np.arange(4) * (11 + 3 * view)) % 29
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def vectors(view):
    """Features, float32 [24, 3]."""
    return ((np.arange(SAMPLES)[:, None] * (5 + view) + np.arange(3) * 7) % 23 - 11.5).astype(np.float32)


def arguments(name, release):
    """What `create_cache` takes for the store `name` of a release."""
    views = RandomResizedCrop(size=8, count=2, seed=3) if name in ("float16", "logit") else CropFlip(pad=0)
    identity = Identity(
        classes=CLASSES,
        temperature=2.0,
        views=views,
        dataset={"name": "animaux"},
        teacher={"digest": "0f", "depth": 8},
        computed={} if release == "0.1.0.dev0" else COMPUTED,
    )
    label = np.minimum(np.arange(SAMPLES) // 8, 3)
    columns = {"sample_id": np.arange(SAMPLES) * 5 + 2, "label": label, "image_size": np.full((SAMPLES, 2), 12)}
    # the codebook of one release is fitted to a part of what it is asked for, and does not fit the rest
    fitted = slice(None) if release == "0.1.0.dev0" else slice(1)
    fit = {"fit": lambda numbers: np.stack([probability(view)[fitted] for view in numbers])}
    features = {} if release == "0.1.0.dev0" else {"features": {"resnet8": 3}}
    return {"identity": identity, "encoding": ENCODINGS[name], **columns, **fit, **features}


def dump(url, name, release):
    with create_cache(url, **arguments(name, release)) as writer:
        for view, block in writer.pending():
            writer.write(view, block, probability(view), {name: vectors(view) for name in writer.cache.features})


def test_there_are_stores_of_each_release():
    assert list(OF) == [
        *(f"0.1.0/{name}" for name in sorted(ENCODINGS)),
        *(f"0.1.0.dev0/{name}" for name in ("float16", "float32", "klt")),
    ]


@pytest.mark.parametrize("store", OF)
def test_a_store_of_an_earlier_version_is_read(store):
    cache, (release, name) = open_cache(OF[store]), store.split("/")
    assert cache.complete and cache.verify_checksums() == [] and cache.additions == []
    assert len(cache.to_pandas()) == 2 * SAMPLES and cache.summary()["complete"]
    assert cache.classes == CLASSES and cache.temperature == 2.0 and cache.sample_id[1] == 7
    assert cache.class_counts.tolist() == [8, 8, 8, 0]
    assert cache.identity.computed == ({} if release == "0.1.0.dev0" else COMPUTED)
    for view in range(2):
        plane, exact = cache.plane(view), probability(view)
        if name == "klt":
            omega = (1 - 0.9999) / (1 - 0.9999 ** np.maximum(cache.class_counts, 1))
            q, rebuilt = (p * omega / (p * omega).sum(1, keepdims=True) for p in (exact, plane))
            assert 0.5 * np.abs(q - rebuilt).sum(1).mean() <= 0.02
        elif name == "logit":
            np.testing.assert_allclose(plane, exact, rtol=4 * 2**-11)
        else:
            assert (plane == exact.astype(name)).all()
        for feature in cache.features:
            direction = vectors(view) / np.linalg.norm(vectors(view), axis=1, keepdims=True)
            np.testing.assert_allclose(cache.feature_plane(feature, view), direction, atol=0.01)


def test_the_codes_of_earlier_versions_are_those_that_were_written():
    codes = open_cache(OF["0.1.0.dev0/klt"]).stored_plane(1)
    assert codes[:3].tolist() == [[12, 4, -48], [16, 0, -4], [-44, 16, 4]] and codes.sum(dtype=int) == -32
    assert open_cache(OF["0.1.0.dev0/klt"]).temperatures == (2.0, 2.0)
    logits = open_cache(OF["0.1.0/logit"]).stored_plane(1)
    assert logits[:2].tolist() == LOGITS and logits.dtype == np.float16


def test_what_the_codebook_does_not_fit_is_read_as_it_was_written():
    cache = open_cache(OF["0.1.0/klt"])
    assert cache.summary()["blocks"]["stored_exactly"] == 2 and (cache.plane(1) == probability(1)).all()


@pytest.mark.parametrize("store", [store for store in OF if not store.endswith("klt")])
def test_todays_writer_writes_the_same_bytes(tmp_path, store):
    release, name = store.split("/")
    dump(tmp_path / "s", name, release)
    assert files(tmp_path / "s") == files(OF[store])


@pytest.mark.parametrize("store", OF)
def test_the_metadata_of_an_earlier_version_are_what_this_one_would_write(store):
    for key, document in open_cache(OF[store]).layout.documents().items():
        assert format.to_bytes(document) == (OF[store] / key).read_bytes()


@pytest.mark.parametrize("store", OF)
def test_a_dump_that_an_earlier_version_began_is_finished(tmp_path, store):
    release, name = store.split("/")
    shutil.copytree(OF[store], tmp_path / "s")
    (tmp_path / "s/done/1.0").unlink()
    with create_cache(tmp_path / "s", resume=True, **arguments(name, release)) as writer:
        assert writer.pending() == [(1, 0)]
        for view, block in writer.pending():
            writer.write(view, block, probability(view), {name: vectors(view) for name in writer.cache.features})
    cache = open_cache(tmp_path / "s")
    assert cache.complete and cache.verify_checksums() == []
    np.testing.assert_array_equal(cache.stored_plane(1), open_cache(OF[store]).stored_plane(1))
    now, then = (set(json.loads((place / "done/1.0").read_text())) for place in (tmp_path / "s", OF[store]))
    assert now == then | ({"reference_checksum"} if name == "klt" else set())  # 0.1.0 did not say it yet


LOGITS = [[-3.3671875, -0.6591796875, 0.0, -0.72802734375], [-0.9384765625, 0.0, -1.0556640625, -0.044464111328125]]


if __name__ == "__main__":
    for each in ENCODINGS:
        dump(STORES / "0.1.0" / each, each, "0.1.0")
        (STORES / "0.1.0" / each / "done/lock").unlink()
