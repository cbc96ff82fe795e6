"""Encoding `klt`: transform-coded log-probabilities, small, with a stated and checked error of the BKD target."""

import dataclasses
import errno
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from cache_store import files, flips, identity, problems

from offline_bkd.cache import (
    CacheError,
    CorruptCacheError,
    CropFlip,
    LostCacheError,
    create_cache,
    format,
    klt,
    open_cache,
    target,
)
from offline_bkd.cache.storage import LocalStorage

KLT = {"name": "klt", "max_error": 0.02}
THREE_BLOCKS = 200 * 40 * 4  # bytes a block, of the 600 samples and 40 classes of `teacher`
REFERENCE = 8  # the plain crop at the centre, of 18


def teacher(classes=40, samples=600, rank=8, scale=3.0, wander=0.3):
    """A function of a view: probabilities [N, C] whose logits are an affine map of a feature that wanders a little."""
    rng = np.random.default_rng(1)
    feature, head = rng.normal(size=(samples, rank)), rng.normal(size=(rank, classes)) * scale / rank**0.5

    def probability(view):
        moved = feature + wander * np.random.default_rng(view + 10).normal(size=feature.shape)
        logits = (moved @ head).astype(np.float32)
        return target.softmax(logits)

    return probability


def klt_arguments(probability, **changes):
    samples, classes = probability(0).shape
    counts = np.maximum(1, (samples * 0.9 ** np.arange(classes) * 0.1)).astype(int)
    label = np.repeat(np.arange(classes), counts)
    label = np.concatenate([label, np.zeros(max(0, samples - len(label)), int)])[:samples]
    values = {
        "identity": identity(classes=tuple(f"class {c}" for c in range(classes))),
        "sample_id": np.arange(samples),
        "label": label,
        "image_size": np.full((samples, 2), 8),
        "encoding": KLT,
        "fit": lambda views: np.stack([probability(view) for view in views]),
    }
    return {**values, **changes}


def fill(writer, probability, blocks=None):
    for view, block in writer.pending() if blocks is None else blocks:
        writer.write(view, block, probability(view)[writer.rows(block)])


def dump(url, probability, **changes):
    with create_cache(url, **klt_arguments(probability, **changes)) as writer:
        fill(writer, probability)
    return open_cache(url)


def target_error(cache, view, probability):
    """Mean and worst total variation from the exact BKD target, in float64 from the papers' formulas."""
    omega = (1 - 0.9999) / (1 - 0.9999 ** np.maximum(cache.class_counts, 1.0))
    q, rebuilt = (omega * p.astype(np.float64) for p in (probability(view), cache.plane(view)))
    q, rebuilt = (p / p.sum(1, keepdims=True) for p in (q, rebuilt))
    variation = 0.5 * np.abs(q - rebuilt).sum(1)
    return variation.mean(), variation.max()


@pytest.fixture
def three_blocks(monkeypatch):
    monkeypatch.setattr(format, "_BLOCK_BYTES", THREE_BLOCKS)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A whole store of `teacher`, to read."""
    folder = tmp_path_factory.mktemp("plain") / "s"
    dump(folder, teacher())
    return folder


@pytest.fixture
def changeable(plain, tmp_path):
    """A copy of it, to change."""
    return shutil.copytree(plain, tmp_path / "s")


@pytest.mark.parametrize("max_error", [0.05, 0.02, 0.005])
def test_every_views_mean_error_is_within_the_bound_and_not_far_below_it(tmp_path, max_error):
    probability = teacher()
    cache = dump(tmp_path / "s", probability, encoding={"name": "klt", "max_error": max_error})
    errors = [target_error(cache, view, probability)[0] for view in range(18)]
    assert max_error / 2 < max(errors) <= max_error


def test_the_errors_that_are_stated_are_those_that_are_there(tmp_path, three_blocks):
    probability = teacher()
    cache = dump(tmp_path / "s", probability)
    found = [target_error(cache, view, probability) for view in range(18)]
    stated = cache.summary()["error"]
    assert stated["bound"] == 0.02
    assert stated["mean"] == pytest.approx(np.mean([mean for mean, _ in found]), abs=2e-5)
    assert stated["worst"] == pytest.approx(max(worst for _, worst in found), abs=2e-5)


def test_it_is_far_smaller_than_half_precision_and_other_views_smaller_than_the_reference(tmp_path):
    cache = dump(tmp_path / "s", teacher(samples=3000, wander=0.1))
    sizes = [(tmp_path / f"s/code/c.{view}.0.0").stat().st_size / 3000 for view in range(18)]
    assert sizes[REFERENCE] < 8 and sum(sizes) / 18 < 6 < 80 == 2 * len(cache.classes)
    assert max(size for view, size in enumerate(sizes) if view != REFERENCE) < 0.8 * sizes[REFERENCE]


def test_decoding_is_one_matrix_product_and_a_softmax(tmp_path, three_blocks):
    cache = dump(tmp_path / "s", teacher())
    codes, decoder = cache.stored_plane(3), cache.decoder
    assert codes.dtype == np.int16 and codes.shape == (600, len(decoder.basis))
    logits = codes.astype(np.float64) @ decoder.basis.astype(np.float64) + decoder.mean
    expected = np.exp(logits - logits.max(1, keepdims=True))
    np.testing.assert_allclose(cache.plane(3), expected / expected.sum(1, keepdims=True), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(cache.rows([5, 7], [3, 3]), cache.plane(3)[[5, 7]], rtol=1e-5)


def test_decoding_goes_into_a_given_array_and_gives_the_same_bits(tmp_path):
    for encoding in KLT, {"name": "probability", "dtype": "float16"}:
        cache = dump(tmp_path / encoding["name"], teacher(), encoding=encoding)
        codes, out = cache.stored_plane(3), np.full((600, 40), 7, np.float32)
        assert cache.encoding.decode(codes, out) is out and (out == cache.plane(3)).all()


@pytest.mark.parametrize("code", [-30_000, 30_000])
def test_codes_that_mean_logits_beyond_float32_decode_to_distributions(tmp_path, code):
    encoding = dump(tmp_path / "s", teacher(scale=30), encoding={"name": "klt", "max_error": 0.2}).encoding
    codes = np.zeros((3, encoding.coefficients), np.int16)
    codes[1] = code
    found = encoding.decode(codes)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_no_code_is_the_fill_value(plain):
    import zarr

    array = zarr.open_array(plain / "code", mode="r")
    assert array.dtype == np.int8 and array.fill_value == -128 and array[...].min() >= -127


def test_a_row_decodes_to_the_same_bits_whatever_is_beside_it():
    generator, classes = np.random.default_rng(0), 1000
    matrix = generator.normal(0, 0.1, (30, classes)).astype(np.float32)
    codes = generator.integers(-40, 40, (6000, 29)).astype(np.int16)
    whole = klt._decoded(codes, matrix)
    for rows in np.arange(50), generator.permutation(6000)[:3001], np.arange(5000, 5001):
        assert (klt._decoded(codes[rows], matrix) == whole[rows]).all()


def test_decoding_in_several_threads_leaves_the_number_of_threads_as_it_was():
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_info

    def threads():
        return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]

    matrix, codes, before = np.zeros((9, 1000), np.float32), np.zeros((6000, 8), np.int16), threads()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: klt._decoded(codes, matrix), range(12)))
    assert threads() == before


def test_codes_beyond_eight_bits_have_a_second_column(tmp_path):
    probability = teacher(scale=30)
    cache = dump(tmp_path / "s", probability, encoding={"name": "klt", "max_error": 0.002})
    assert cache.encoding.high > 0 and np.abs(cache.stored_plane(3)).max() > 127
    assert all(target_error(cache, view, probability)[0] <= 0.002 for view in range(18))


@pytest.mark.parametrize("scale", [0.001, 0.1, 10, 100])
def test_logits_of_any_scale(tmp_path, scale):
    probability = teacher(scale=scale)
    cache = dump(tmp_path / "s", probability)
    assert cache.complete and all(target_error(cache, view, probability)[0] <= 0.02 for view in range(18))


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_any_number_of_classes(tmp_path, classes):
    probability = teacher(classes=classes)
    cache = dump(tmp_path / "s", probability, identity=klt_arguments(probability)["identity"])
    assert all(target_error(cache, view, probability)[0] <= 0.02 for view in range(18))


@pytest.mark.parametrize("scale", [3, 0])
def test_ten_thousand_classes(tmp_path, scale):
    probability = teacher(classes=10_000, samples=160, scale=scale)
    given = klt_arguments(probability)["identity"]
    views = CropFlip(pad=0)
    cache = dump(tmp_path / "s", probability, identity=identity(classes=given.classes, views=views))
    assert all(target_error(cache, view, probability)[0] <= 0.02 for view in range(2))


def rows_of(kind):
    if kind == "uniform":
        return np.full((600, 40), 1 / 40, np.float32)
    one_hot = np.eye(40, dtype=np.float32)[np.arange(600) % 40]
    if kind == "one-hot":
        return one_hot
    if kind == "equal":
        return np.tile(teacher()(0)[:1], (600, 1))
    return np.concatenate([one_hot[:200], np.full((200, 40), 1 / 40, np.float32), teacher()(0)[:200]])


@pytest.mark.parametrize("kind", ["uniform", "one-hot", "equal", "all of these"])
def test_degenerate_rows(tmp_path, kind):
    p = rows_of(kind)
    if kind == "all of these":
        p = p[np.random.default_rng(0).permutation(600)]
    cache = dump(tmp_path / "s", lambda view: p)
    assert target_error(cache, 0, lambda view: p)[0] <= 0.02


def test_averaged_teachers(tmp_path):
    first, second = teacher(), teacher(rank=12, scale=2)
    cache = dump(tmp_path / "s", lambda view: (first(view) + second(view)) / 2)
    assert all(target_error(cache, view, lambda v: (first(v) + second(v)) / 2)[0] <= 0.02 for view in (0, 8, 17))


def test_one_sample(tmp_path):
    probability = teacher(samples=1, wander=0)
    cache = dump(tmp_path / "s", probability)
    assert target_error(cache, 5, probability)[0] <= 0.02


# the bound is checked


def test_a_block_that_would_exceed_the_bound_takes_a_finer_step(tmp_path):
    probability, harder = teacher(), teacher(scale=5)
    with create_cache(tmp_path / "s", **klt_arguments(probability)) as writer:
        writer.write(REFERENCE, 0, probability(REFERENCE))
        writer.write(3, 0, harder(3))
        writer.write(4, 0, probability(4))
    shifts = [json.loads((tmp_path / f"s/done/{view}.0").read_text())["shift"] for view in (3, 4)]
    assert shifts[0] < shifts[1] == 2
    cache = open_cache(tmp_path / "s")
    assert target_error(cache, 3, harder)[0] <= 0.02 and target_error(cache, 4, probability)[0] <= 0.02
    assert (cache.stored_plane(4) % 4 == 0).all()


def unforeseen_answers(view):
    """Which a codebook for `teacher` does not fit in the second block of the reference and of view 3."""
    p = teacher()(view).copy()
    if view in (3, REFERENCE):
        p[200:400] = teacher(rank=30, scale=9)(view)[200:400]
    return p


@pytest.fixture(scope="module")
def unforeseen(tmp_path_factory):
    """A store of them, with that codebook, to read."""
    folder, foreseen = tmp_path_factory.mktemp("unforeseen") / "s", teacher()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(format, "_BLOCK_BYTES", THREE_BLOCKS)
        dump(folder, unforeseen_answers, fit=lambda views: np.stack([foreseen(view) for view in views]))
    return folder


def test_a_block_that_the_codebook_does_not_fit_is_stored_as_it_is(unforeseen, three_blocks):
    import zarr

    cache, probability = open_cache(unforeseen), unforeseen_answers
    assert cache.complete and cache.verify_checksums() == []
    for view in range(18):
        assert target_error(cache, view, probability)[0] <= 0.02
    for view in 3, REFERENCE:
        assert (cache.plane(view)[200:400] == probability(view)[200:400]).all()
        assert target_error(cache, view, probability)[0] > 0.001, "other blocks of the view are coded"
    summary = cache.summary()
    assert summary["blocks"]["stored_exactly"] == 2 and 0 < summary["error"]["mean"] <= 0.02
    assert cache.nbytes == sum(map(len, files(unforeseen).values()))
    array = zarr.open_array(unforeseen / "probability", mode="r")
    assert array.shape == (18, 600, 40) and np.isnan(array[3, :200]).all()
    assert (array[3, 200:400] == probability(3)[200:400]).all()


def test_what_reads_a_store_does_not_care_that_blocks_are_stored_as_they_are(unforeseen, three_blocks):
    import torch

    from offline_bkd.pipeline.training.targets import Targets

    cache, probability = open_cache(unforeseen), unforeseen_answers
    samples, views = np.array([250, 10, 399]), np.array([3, 3, 7])
    rows = cache.rows(samples, views)
    assert (rows[0] == probability(3)[250]).all() and cache.decoder is None
    targets = Targets(cache, torch.device("cpu"))
    np.testing.assert_array_equal(targets.probability(torch.from_numpy(samples), torch.from_numpy(views)), rows)
    assert (cache.to_pandas(view=3).confidence == cache.plane(3).max(1)).all()
    assert cache.temperatures == open_cache(str(cache)).temperatures != (2.0, 2.0)


@pytest.mark.parametrize("key", ["probability/c.3.1.0", "code/c.3.1.0", "code/c.8.1.0"])
def test_damage_beside_what_is_stored_as_it_is_is_found(unforeseen, three_blocks, tmp_path, key):
    path = shutil.copytree(unforeseen, tmp_path / "s") / key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    problems = open_cache(tmp_path / "s").verify_checksums()
    assert len(problems) == 1 and "rows 200 to 399 is damaged" in problems[0], "once, though 17 views need the reference"


def test_a_store_that_was_opened_before_says_so(tmp_path, three_blocks):
    probability, other = teacher(), teacher(rank=30, scale=9)
    with create_cache(tmp_path / "s", **klt_arguments(probability)) as writer:
        fill(writer, probability, [(REFERENCE, 0), (3, 0)])
        before = open_cache(tmp_path / "s")
        fill(writer, other, [(REFERENCE, 1)])
        assert writer.exact == 1
    assert before.stored_block(3, 0).dtype == np.int16
    with pytest.raises(CacheError, match="view 8, rows 200 to 399 is stored otherwise since this store was opened; open it"):
        before.stored_block(REFERENCE, 1)
    assert (open_cache(tmp_path / "s").stored_block(REFERENCE, 1) == other(REFERENCE)[200:400]).all()


def test_what_is_stored_as_it_is_resumes_to_the_same_bytes(tmp_path, unforeseen, three_blocks):
    whole, probability = files(shutil.copytree(unforeseen, tmp_path / "s")), unforeseen_answers
    for name in "3.1", "8.1":
        (tmp_path / "s/done" / name).unlink()
    with create_cache(tmp_path / "s", resume=True, **klt_arguments(probability)) as writer:
        assert len(writer.pending()) == 18, "and what differs from it"
        fill(writer, probability)
    assert files(tmp_path / "s") == whole


def test_a_store_of_an_older_version_refuses_a_block_that_its_codebook_does_not_fit(tmp_path, monkeypatch):
    probability, other = teacher(), teacher(rank=30, scale=9)
    fitted = klt.Klt.fitted

    def older(*given):
        return dataclasses.replace(fitted(*given), exact_blocks=False, temperature_range=None)

    monkeypatch.setattr(klt.Klt, "fitted", older)
    with create_cache(tmp_path / "s", **klt_arguments(probability)) as writer:
        message = r"view 8, rows 0 to 599: the mean error is 0\.\d+, above max_error 0.02: .*; dump into another folder"
        with pytest.raises(CacheError, match=message):
            writer.write(REFERENCE, 0, other(8))
        assert (REFERENCE, 0) in writer.pending()
    assert not (tmp_path / "s/probability").exists()


def test_a_bound_that_no_codebook_reaches_is_refused(tmp_path):
    classes = 5000  # above 4096 the basis is what the fit's rows span, and these rows span too little
    wide = np.random.default_rng(0).dirichlet(np.ones(classes), 40).astype(np.float32)
    given = identity(classes=tuple(str(c) for c in range(classes)), views=CropFlip(pad=0))
    with pytest.raises(CacheError, match="no codebook reaches max_error with 20 samples to fit it to; give more"):
        create_cache(tmp_path / "s", **klt_arguments(lambda view: wide, identity=given))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fit": None}, "encoding klt is fitted to the teacher: give `fit`"),
        ({"fit": lambda views: np.ones((1, 600, 40))}, r"probabilities \[4, samples, 40\], found \[1, 600, 40\]"),
        ({"fit": lambda views: np.full((4, 600, 40), np.nan)}, r"view 8: an answer is not a distribution \(from nan"),
        ({"fit": lambda views: np.ones((4, 600, 40))}, r"not a distribution \(from 1.0 to 1.0, sum 40.0\); mend the teacher"),
        ({"fit": lambda views: np.ones((600, 40))}, r"probabilities \[4, samples, 40\], found \[600, 40\]"),
        ({"encoding": {"name": "klt", "max_error": 0}}, "max_error is a mean total variation between 0 and 1, found 0"),
        ({"encoding": {"name": "klt", "max_error": "0.1"}}, "max_error is a mean total variation .* found '0.1'"),
        ({"encoding": {"name": "klt", "step": 1}}, "encoding klt does not take step; it takes max_error"),
    ],
)
def test_what_makes_no_codebook_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        create_cache(tmp_path / "s", **klt_arguments(teacher(), **changes))


def test_a_store_that_another_process_made_while_the_codebook_was_fitted_is_kept(tmp_path):
    probability = teacher()

    def fit(views):
        dump(tmp_path / "s", probability, identity=identity(classes=tuple(f"class {c}" for c in range(40)), temperature=3.0))
        return np.stack([probability(view) for view in views])

    with pytest.raises(CacheError, match="was made by another process meanwhile; resume its dump"):
        create_cache(tmp_path / "s", **klt_arguments(probability, fit=fit))
    cache = open_cache(tmp_path / "s")
    assert cache.complete and cache.temperature == 3 and cache.verify_checksums() == []


def test_the_codebook_is_fitted_to_the_reference_and_views_far_from_it():
    assert klt.fit_views(CropFlip(pad=4)) == [80, 0, 53, 107]
    assert klt.fit_views(CropFlip(pad=0, flip=False)) == [0]
    assert klt.fit_views(CropFlip(pad=0)) == [0, 1]


def test_class_weights_are_the_papers():
    weight = target.class_weight([500, 5, 0])
    assert weight[0] == pytest.approx((1 - 0.9999) / (1 - 0.9999**500))
    assert weight[1] / weight[0] == pytest.approx(97.6, abs=0.1) and weight[2] == pytest.approx(1)


# writing and resuming


def test_the_reference_view_comes_first_and_others_wait_for_it(tmp_path, three_blocks):
    probability = teacher()
    with create_cache(tmp_path / "s", **klt_arguments(probability)) as writer:
        assert writer.pending()[:4] == [(8, 0), (8, 1), (8, 2), (0, 0)]
        with pytest.raises(CacheError, match="code, view 8, rows 200 to 399 is not dumped yet"):
            fill(writer, probability, [(0, 1)])
        fill(writer, probability, [(8, 1), (0, 1)])
    with pytest.raises(CacheError, match="code, view 8, rows 0 to 199 is not dumped yet"):
        open_cache(tmp_path / "s").plane(8)


def test_resuming_needs_no_fit_and_gives_the_same_bytes(tmp_path, three_blocks):
    probability = teacher()
    dump(tmp_path / "whole", probability)
    with create_cache(tmp_path / "s", **klt_arguments(probability)) as writer:
        fill(writer, probability, writer.pending()[:7])
    with create_cache(tmp_path / "s", resume=True, **klt_arguments(probability, fit=None)) as writer:
        fill(writer, probability)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_what_was_stored_as_differences_from_a_lost_reference_is_written_anew(tmp_path, three_blocks):
    probability, url = teacher(), tmp_path / "s"
    dump(url, probability)
    opened = open_cache(url)  # by another process, before the loss
    opened.plane(0)
    (url / "done/8.1").unlink()

    def elsewhere(view):  # another machine's bits, and more: every code of the reference is another one
        return probability(view + 20)

    with create_cache(url, resume=True, **klt_arguments(probability)) as writer:
        assert set(writer.pending()) == {(view, 1) for view in range(18)} and writer.pending()[0] == (8, 1)
        fill(writer, elsewhere, writer.pending()[:1])
    assert len(open_cache(url).missing()) == 17
    with create_cache(url, resume=True, **klt_arguments(probability)) as writer:
        assert len(writer.pending()) == 17
        fill(writer, probability)
    cache = open_cache(url)
    assert cache.complete and cache.verify_checksums() == []
    assert all(target_error(cache, view, probability)[0] <= 0.02 for view in range(18) if view != REFERENCE)
    assert (opened.stored_plane(0) == cache.stored_plane(0)).all()


def test_a_reference_that_others_differ_from_is_not_written_again(tmp_path):
    probability = teacher()
    with create_cache(tmp_path / "s", **klt_arguments(probability)) as writer:
        fill(writer, probability, [(8, 0), (3, 0), (3, 0)])
        with pytest.raises(ValueError, match="view 8, block 0 is written; other views are stored as differences from it"):
            fill(writer, probability, [(8, 0)])


def test_resuming_with_another_bound_or_encoding_is_refused(plain):
    before = files(plain)
    for encoding, message in [
        ({"name": "klt", "max_error": 0.01}, "encoding.max_error: the store has 0.02, the run has 0.01"),
        ({"name": "probability"}, "encoding.name: the store has klt, the run has probability"),
    ]:
        with pytest.raises(CacheError, match=message):
            create_cache(plain, resume=True, **klt_arguments(teacher(), encoding=encoding))
    assert files(plain) == before


# damage and malice


def test_damage_is_found_wherever_it_is(tmp_path, three_blocks):
    url, probability = tmp_path / "s", teacher()
    dump(url, probability, identity=identity(classes=tuple(map(str, range(40))), views=CropFlip(pad=0)))
    for place in flips(url, 150, "code"):
        assert problems(url), place
    assert open_cache(url).verify_checksums() == []


def test_damage_in_the_reference_is_named_for_the_view_that_needs_it(tmp_path, changeable):
    os.truncate(tmp_path / "s/code/c.8.0.0", 100)
    with pytest.raises(CorruptCacheError, match="^[^;]*code, view 8, rows 0 to 599 is damaged: it has 100 bytes[^;]*; [^;]*$"):
        open_cache(tmp_path / "s").plane(3)
    (problem,) = open_cache(tmp_path / "s").verify_checksums()
    assert problem.endswith("delete its marker done/8.0 and resume the dump, which writes it again")


def test_what_keeps_the_reference_from_being_read_is_no_damage(tmp_path, monkeypatch):
    probability = teacher()
    with create_cache(tmp_path / "s", **klt_arguments(probability)) as writer:
        fill(writer, probability, [(8, 0), (3, 0)])
        cache = open_cache(tmp_path / "s")
        several = LocalStorage.read_several, LocalStorage.read

        def unplugged(real):
            def read(self, keys, *given):
                if "done/8.0" in ([keys] if isinstance(keys, str) else keys):
                    raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
                return real(self, keys, *given)

            return read

        with monkeypatch.context() as patch:
            for name, real in zip(("read_several", "read"), several):
                patch.setattr(LocalStorage, name, unplugged(real))
            with pytest.raises(LostCacheError, match="view 8.*timed out"):
                cache.plane(3)
            writer.cache._reference.clear()
            with pytest.raises(LostCacheError, match="view 8.*timed out"):
                fill(writer, probability, [(4, 0)])
    (tmp_path / "s/done/8.0").unlink()
    with pytest.raises(CacheError, match="view 8, rows 0 to 599 is not dumped yet") as caught:
        open_cache(tmp_path / "s").plane(3)
    assert not isinstance(caught.value, CorruptCacheError)


@pytest.mark.parametrize("field, value", [("coefficients", 41), ("coefficients", None), ("high", 99), ("reference", 18)])
def test_a_codebook_that_cannot_be_is_refused(tmp_path, changeable, field, value):
    path = tmp_path / "s/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["encoding"][field] = value
    path.write_bytes(format.to_bytes(document))
    with pytest.raises(CacheError, match="its codebook is not one for 40 classes and 18 views"):
        open_cache(tmp_path / "s")


@pytest.mark.parametrize(
    "field, value",
    [
        ("exact_blocks", 1),
        ("temperature_range", [2, 3]),
        ("temperature_range", "ab"),
        ("temperature_range", [0.5, float("inf")]),
    ],
)
def test_what_a_store_says_of_its_codebook_makes_sense_or_is_refused(tmp_path, changeable, field, value):
    path = tmp_path / "s/zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["encoding"][field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(CacheError, match=f"has an encoding that this version does not read: {field} is"):
        open_cache(tmp_path / "s")


def test_differences_from_what_a_view_was_before_are_not_read(tmp_path, plain, changeable):
    kept = "code/c.8.0.0", "done/8.0"
    assert REFERENCE == 8
    (tmp_path / "s/done/8.0").unlink()
    with create_cache(tmp_path / "s", resume=True, **klt_arguments(teacher())) as writer:
        other = teacher(wander=0.31)
        fill(writer, lambda view: other(view))
    cache = open_cache(tmp_path / "s")
    assert cache.complete and cache.verify_checksums() == []
    for name in kept:  # a file put back from a copy
        shutil.copy(plain / name, tmp_path / "s" / name)
    cache = open_cache(tmp_path / "s")
    assert cache.complete and len(cache.verify_checksums()) == 17
    with pytest.raises(CorruptCacheError, match="view 3, .* stored as differences from what view 8 was before it was written"):
        cache.plane(3)
    values = {view: json.loads((tmp_path / f"s/done/{view}.0").read_text()).get("reference_checksum") for view in (3, 8)}
    assert values == {3: values[3], 8: None} and len(values[3]) == 8


@pytest.mark.parametrize("frames", [1, 2])
def test_a_chunk_that_claims_to_grow_is_refused_before_it_does(tmp_path, changeable, frames):
    import google_crc32c
    from numcodecs.zstd import Zstd

    path, marker = tmp_path / "s/code/c.3.0.0", tmp_path / "s/done/3.0"
    bomb = Zstd(level=1).encode(bytes(1 << 26))
    if frames == 2:  # of which the first is what it should be
        bomb = path.read_bytes()[:-4] + bomb
    bomb += google_crc32c.value(bomb).to_bytes(4, "little")
    path.write_bytes(bomb)
    values = json.loads(marker.read_text())
    values["files"] = {"code/c.3.0.0": {"size": len(bomb), "checksum": bomb[-4:].hex()}}
    marker.write_bytes(format.marker(**{key: value for key, value in values.items() if key != "checksum"}))
    cache, found = open_cache(tmp_path / "s"), "it claims to hold 67108864 bytes of" if frames == 1 else "destination buffer"
    tracemalloc.start()
    with pytest.raises(CorruptCacheError, match=f"view 3, rows 0 to 599 is damaged: .*{found}"):
        cache.plane(3)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("size", [0, 1, 255, 256, 300, 65_791, 65_792, 1 << 20])
def test_the_size_of_a_zstandard_frame_is_read_from_its_header(size):
    from numcodecs.zstd import Zstd

    data = Zstd(level=19).encode(np.random.default_rng(0).bytes(size))
    assert klt._zstd_content(data[:18]) == size


def test_other_readers_open_the_codes(plain):
    tensorstore = pytest.importorskip("tensorstore")
    import zarr

    where = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(plain / "code")}}
    found = tensorstore.open(where, read=True).result().read().result()
    assert (found == zarr.open_array(plain / "code", mode="r")[...]).all()


def test_the_table_is_that_of_the_decoded_probabilities(plain):
    cache = open_cache(plain)
    assert (cache.to_pandas(view=4).confidence == cache.plane(4).max(1)).all()
