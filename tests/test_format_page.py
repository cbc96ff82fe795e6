"""docs/format.md is enough to read a store by: this reader follows its text, with NumPy and Zarr alone."""

import hashlib
import json
import math
from pathlib import Path

import cache_store
import numpy as np
import pytest
import zarr

from offline_bkd.cache import CropFlip, RandomResizedCrop, create_cache, format, open_cache

KEPT = Path(__file__).parent / "stores"


class Store:
    def __init__(self, folder: Path):
        self.folder, self.group = folder, zarr.open_group(folder, mode="r", zarr_format=3)
        self.encoding, self.identity = self.group.attrs["encoding"], self.group.attrs["identity"]
        assert self.group.attrs["cache_format"] == 1
        self.array = self.group["code" if self.encoding["name"] == "klt" else self.encoding["name"]]
        self.rows = self.array.chunks[1]
        self.blocks = math.ceil(self.array.shape[1] / self.rows)

    def marker(self, view, block):
        line = (self.folder / "done" / f"{view}.{block}").read_text()
        body = json.loads(line)
        checksum = body.pop("checksum")
        written = json.dumps(body, indent=1, ensure_ascii=False) + "\n"
        assert checksum == hashlib.sha256(written.encode()).hexdigest()
        assert body["store"] == hashlib.sha256((self.folder / "done" / "store").read_bytes()).hexdigest()
        for key, file in body["files"].items():
            chunk = (self.folder / key).read_bytes()
            assert (len(chunk), chunk[-4:].hex()) == (file["size"], file["checksum"])
        return body

    def block(self, view, block):
        """Probabilities of one block of one view, float32 [rows, C]."""
        marker, rows = self.marker(view, block), self.span(block)
        if self.encoding.get("exact_blocks") and any(key.startswith("probability/") for key in marker["files"]):
            return self.group["probability"][view, rows]
        if self.encoding["name"] == "probability":
            return self.array[view, rows].astype(np.float32)
        if self.encoding["name"] == "logit":
            logits = self.array[view, rows].astype(np.float32)
        else:
            mean, basis = self.group["codebook/mean"][:], self.group["codebook/basis"][:]
            logits = self.codes(view, block, marker["shift"]).astype(np.float32) @ basis + mean
        logits = np.exp(logits - logits.max(1, keepdims=True))
        return logits / logits.sum(1, keepdims=True)

    def codes(self, view, block, shift):
        stored, encoding = self.array[view, self.span(block)].astype(np.int16), self.encoding
        code = stored[:, : encoding["coefficients"]].copy()
        code[:, : encoding["high"]] += 255 * stored[:, encoding["coefficients"] :]
        if view != encoding["reference"]:
            first = self.codes(encoding["reference"], block, self.marker(encoding["reference"], block)["shift"])
            scaled = self.group["codebook/prediction"][:] * np.float32(2.0**-shift)
            code += np.rint(first.astype(np.float32) * scaled).astype(np.int16)
        return code * np.int16(2**shift)

    def feature(self, name, view):
        code = self.group["feature"][name][view].astype(np.float32)
        return code / np.linalg.norm(code, axis=1, keepdims=True)

    def span(self, block):
        return slice(block * self.rows, min((block + 1) * self.rows, self.array.shape[1]))

    def plane(self, view):
        return np.concatenate([self.block(view, block) for block in range(self.blocks)])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(format, "_BLOCK_BYTES", 5 * 4 * 100)


def vectors(view):
    return np.random.default_rng(view).normal(size=(360, 12)).astype(np.float32)


@pytest.mark.parametrize(
    "encoding",
    [
        {"name": "logit"},
        {"name": "probability", "dtype": "float32"},
        {"name": "probability", "dtype": "float16"},
        {"name": "klt", "max_error": 0.02},
        {"name": "klt", "max_error": 0.0005},  # codes of more than eight bits
    ],
    ids=lambda encoding: "-".join(map(str, encoding.values())),
)
def test_a_store_is_read_by_the_page_alone(tmp_path, small_blocks, encoding):
    fit = {"fit": lambda views: np.stack([cache_store.answers(view) for view in views])}
    given = cache_store.arguments(encoding=encoding, features={"teacher": 12}, **fit)
    with create_cache(tmp_path / "s", **given) as writer:
        for view, block in writer.pending():
            rows = writer.rows(block)
            writer.write(view, block, cache_store.answers(view)[rows], {"teacher": vectors(view)[rows]})
    store, cache = Store(tmp_path / "s"), open_cache(tmp_path / "s")
    if encoding["name"] == "klt":
        assert (store.encoding["high"] > 0) == (encoding["max_error"] < 0.001)
    assert store.blocks == 4 and store.group["sample_id"][:].tolist() == given["sample_id"].tolist()
    weight = (1 - 0.9999) / (1 - 0.9999 ** np.bincount(store.group["label"][:]))
    for view in 0, 8, 17:
        np.testing.assert_allclose(store.plane(view), cache.plane(view), rtol=1e-5, atol=1e-7)
        for block in range(store.blocks):
            exact, read = weight * cache_store.answers(view)[store.span(block)], weight * store.block(view, block)
            distance = np.abs(exact / exact.sum(1, keepdims=True) - read / read.sum(1, keepdims=True)).sum(1) / 2
            if encoding["name"] == "klt":
                stated = store.marker(view, block)["error"]
                assert stated["mean"] <= encoding["max_error"]
                assert distance.mean() == pytest.approx(stated["mean"], abs=2e-6)
                assert distance.max() == pytest.approx(stated["worst"], abs=2e-6)
            else:
                # of logits the bound is 2^-11 (log 5 + log w), and w are up to 6
                assert distance.max() < {"float16": 2.0**-11, "float32": 2.0**-23, None: 3.4 * 2**-11}[encoding.get("dtype")]
        np.testing.assert_allclose(store.feature("teacher", view), cache.feature_plane("teacher", view), atol=1e-6)


@pytest.mark.parametrize("name", sorted(path.relative_to(KEPT).as_posix() for path in KEPT.glob("*/*")))
def test_the_kept_stores_are_read_by_the_page_alone(name):
    store, cache = Store(KEPT / name), open_cache(KEPT / name)
    for view in range(cache.views.count):
        np.testing.assert_allclose(store.plane(view), cache.plane(view), rtol=1e-5, atol=1e-7)


def words(seed, sample_id, view, number):
    """Philox4x32-10, in Python's own integers."""
    counter, key, low = [sample_id, view, 4, number], [seed % 2**32, seed // 2**32], 2**32
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second // low ^ counter[1] ^ key[0], second % low, first // low ^ counter[3] ^ key[1], first % low]
        key = [(key[0] + 0x9E3779B9) % low, (key[1] + 0xBB67AE85) % low]
    return counter


def resized_crop(views, sample_id, view, h, w):
    """(top, left, height, width, mirrored)"""
    ratios = np.rint(np.geomspace(*views["ratio"], 1024) * 2**20) / 2**20
    mirrored = views["flip"] and words(views["seed"], sample_id, view, 10)[0] % 2
    for number in range(10):
        drawn = words(views["seed"], sample_id, view, number)
        area = h * w * (views["scale"][0] + (views["scale"][1] - views["scale"][0]) * drawn[0] / 2**32)
        ratio = ratios[drawn[1] * 1024 // 2**32]
        width, height = (int(np.rint(np.sqrt(side))) for side in (area * ratio, area / ratio))
        if 0 < width <= w and 0 < height <= h:
            return drawn[2] * (h - height + 1) // 2**32, drawn[3] * (w - width + 1) // 2**32, height, width, mirrored
    width, height = (min(w, int(np.rint(h * views["ratio"][1]))), min(h, int(np.rint(w / views["ratio"][0]))))
    return (h - height) // 2, (w - width) // 2, height, width, mirrored


def test_views_are_the_crops_that_the_page_says():
    for pad, flip in ((1, True), (2, False)):
        side, sides = 2 * pad + 1, 1 + flip
        for view in range(CropFlip(pad=pad, flip=flip).count):
            expected = [view // (sides * side) - pad, view // sides % side - pad, 8, 9, view % sides]
            found = CropFlip(pad=pad, flip=flip).boxes([5], [view], [[8, 9]])
            assert np.concatenate(found).tolist() == expected
    views = {"size": 8, "count": 4, "scale": (0.3, 1.0), "ratio": (0.6, 1.5), "flip": True, "seed": 2**40 + 7}
    sizes = [(30, 40), (3, 90), (64, 64), (1, 1)]  # of the second no try fits
    for sample_id in (3, 2**31):
        for view in range(4):
            for h, w in sizes:
                found = np.concatenate(RandomResizedCrop(**views).boxes([sample_id], [view], [[h, w]]))
                assert found.tolist() == list(resized_crop(views, sample_id, view, h, w))
