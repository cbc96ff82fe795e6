"""Answers at another temperature than the store's are within a hundredth of the exact ones, or refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_store import answers, dump, identity

from offline_bkd.cache import CacheError, CropFlip, open_cache, tempering
from offline_bkd.cache.target import class_weight
from offline_bkd.pipeline.training.targets import Targets

LOGIT, HALF, EXACT = {"name": "logit"}, {"name": "probability"}, {"name": "probability", "dtype": "float32"}
OTHERS = 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 20.0, 100.0
CLASSES, SAMPLES = 100, 200


def softmax(logits):
    exponential = np.exp(logits - logits.max(1, keepdims=True))
    return exponential / exponential.sum(1, keepdims=True)


def logits(kind, classes=CLASSES):
    """A teacher's logits, float64 [N, C]."""
    rng = np.random.default_rng(0)
    right = rng.integers(0, classes, SAMPLES)
    if kind == "cosine":  # of scale 64
        head = rng.normal(size=(classes, 32))
        head /= np.linalg.norm(head, axis=1, keepdims=True)
        feature = head[right] + 0.1 * rng.normal(size=(SAMPLES, 32))
        return 64 * feature / np.linalg.norm(feature, axis=1, keepdims=True) @ head.T
    found = rng.normal(0, {"sure": 3, "unsure": 1}[kind], (SAMPLES, classes))
    found[np.arange(SAMPLES), right] += {"sure": 25, "unsure": 2}[kind]
    return found


def store(url, z, temperature, encoding, **changes):
    """A store of two views of softmax(z / temperature), float32, of classes a hundred times as rare as others."""
    samples, classes = z.shape
    share = np.maximum(1, (samples / 5 * 0.01 ** (np.arange(classes) / classes)).astype(int))
    probability = softmax(z / temperature).astype(np.float32)
    given = {
        "identity": identity(classes=tuple(map(str, range(classes))), temperature=temperature, views=CropFlip(pad=0)),
        "sample_id": np.arange(samples),
        "label": np.resize(np.repeat(np.arange(classes), share), samples),
        "image_size": np.full((samples, 2), 8),
        "fit": lambda views: np.stack([probability] * len(views)),
    }
    return dump(url, answers=lambda view: probability, encoding=encoding, **given | changes)


def student_of(cache):
    """Of a temperature: what a student's step gets, of every sample under view 1."""
    targets, views = Targets(cache, torch.device("cpu")), np.ones(len(cache), int)
    return lambda temperature: targets.probability(torch.arange(len(cache)), torch.from_numpy(views), temperature).numpy()


def target_error(cache, z, temperature, found):
    """Mean total variation of the BKD target from the exact one, in float64."""
    omega = (1 - 0.9999) / (1 - 0.9999 ** np.maximum(cache.class_counts, 1.0))
    q, rebuilt = (omega * p.astype(np.float64) for p in (softmax(z / temperature), found))
    return (0.5 * np.abs(q / q.sum(1, keepdims=True) - rebuilt / rebuilt.sum(1, keepdims=True)).sum(1)).mean()


@pytest.mark.parametrize("own", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["cosine", "sure", "unsure"])
@pytest.mark.parametrize("encoding", [LOGIT, HALF, EXACT], ids=["logit", "float16", "float32"])
def test_every_temperature_that_is_accepted_is_within_a_hundredth(tmp_path, encoding, kind, own):
    z = logits(kind)
    cache = store(tmp_path / "s", z, own, encoding)
    gathered, (low, high) = student_of(cache), cache.temperatures
    assert low <= own <= high
    for other in (*OTHERS, low, high):
        if low <= other <= high:
            assert target_error(cache, z, other, gathered(other)) <= (0.002 if encoding is LOGIT else 0.01)


def test_the_default_serves_every_temperature_in_use_where_half_precision_probabilities_serve_few(tmp_path):
    z = logits("cosine")
    default, half = store(tmp_path / "a", z, 1.0, LOGIT), store(tmp_path / "b", z, 1.0, HALF)
    assert default.temperatures[0] == 0.01 and default.temperatures[1] > 4
    assert half.temperatures[1] < 2 and target_error(half, z, 8.0, student_of(half)(8.0)) > 0.01
    sizes = [(tmp_path / key).stat().st_size for key in ("a/logit/c.0.0.0", "b/probability/c.0.0.0")]
    assert sizes[0] == sizes[1], "at no cost"
    with pytest.raises(CacheError, match=r"b holds probability at temperature 1, which serves .* not 4; dump at that temper"):
        half.refuse_temperature(4.0)
    default.refuse_temperature(4.0), half.refuse_temperature(1.0)


def test_what_a_teacher_is_not_sure_of_serves_others_in_half_precision_too(tmp_path):
    assert store(tmp_path / "s", logits("unsure"), 2.0, HALF).temperatures[1] == 1000


def test_the_order_of_classes_is_never_turned(tmp_path):
    z = np.tile([0.0, -100.0, -110.0, -12.0, -16.7, -17.5], (SAMPLES, 1))
    for name, encoding in {"a": LOGIT, "b": HALF, "c": EXACT}.items():
        cache = store(tmp_path / name, z, 1.0, encoding)
        for other in (0.25, 1.0, 4.0, 100.0):
            found = student_of(cache)(other)[0]
            assert (np.diff(found[[0, 3, 4, 5, 1, 2]]) <= 0).all(), (encoding, other)


def test_the_default_reads_back_as_softmax_of_what_any_reader_of_zarr_sees(tmp_path):
    import zarr

    z = logits("sure")
    cache = store(tmp_path / "s", z, 2.0, LOGIT)
    array = zarr.open_array(tmp_path / "s/logit", mode="r")
    assert array.shape == (2, SAMPLES, CLASSES) and array.dtype == np.float16 and (array[1].max(1) == 0).all()
    np.testing.assert_allclose(softmax(array[1].astype(np.float64)), cache.plane(1), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(cache.plane(1), softmax(z / 2), rtol=0.02)
    assert cache.decoder is None and (student_of(cache)(2.0) == student_of(cache)(None)).all()


def test_classes_of_probability_zero_stay_so(tmp_path):
    z = logits("unsure")
    z[:, 30:60] = -np.inf
    cache = store(tmp_path / "s", z, 2.0, LOGIT)
    assert (cache.plane(0)[:, 30:60] == 0).all() and (student_of(cache)(8.0)[:, 30:60] == 0).all()
    np.testing.assert_allclose(cache.plane(0).sum(1), 1, rtol=1e-5)
    assert cache.temperatures[1] < 50, "zero may have been anything that float32 cannot hold"


def test_a_transform_coded_store_serves_the_temperatures_that_it_was_tried_at(tmp_path):
    rng = np.random.default_rng(3)
    z = rng.normal(size=(SAMPLES, 6)) @ rng.normal(size=(6, CLASSES)) * 2
    for own in 1.0, 4.0:
        cache = store(tmp_path / str(own), z, own, {"name": "klt", "max_error": 0.02})
        gathered, (low, high) = student_of(cache), cache.temperatures
        assert own / 64 < low < own <= high
        for other in (*OTHERS, low, high):
            if low <= other <= high:
                assert target_error(cache, z, other, gathered(other)) <= 0.02
            else:
                with pytest.raises(CacheError, match="holds klt at temperature .*, which serves temperatures .*name: logit"):
                    cache.refuse_temperature(other)
        assert cache.summary()["temperatures"] == pytest.approx(cache.temperatures, rel=0.01)


def test_an_older_transform_coded_store_serves_its_own():
    cache = open_cache(Path(__file__).parent / "stores/0.1.0.dev0/klt")
    assert cache.temperatures == (2.0, 2.0)
    cache.refuse_temperature(2.0)


@pytest.mark.parametrize(("kind", "words"), [("average_of", "an average"), ("experts", "experts' answers")])
def test_answers_of_several_teachers_serve_their_own_temperature(tmp_path, kind, words):
    teacher = {"digest": "cc", kind: [{"digest": "a"}, {"digest": "b"}]}
    cache = dump(tmp_path / "s", identity=identity(views=CropFlip(pad=0), teacher=teacher), encoding=LOGIT)
    assert cache.temperatures == (2.0, 2.0)
    with pytest.raises(CacheError, match=f"holds {words} at temperature 2, from which none at 4 follows"):
        cache.refuse_temperature(4.0)


def test_the_bound_is_one(tmp_path):
    rng = np.random.default_rng(0)
    weight = class_weight(np.geomspace(500, 5, 30).astype(int))
    for _ in range(50):
        middle = rng.normal(0, rng.uniform(0.1, 10), (20, 30))
        half = rng.uniform(0, rng.uniform(0.01, 1), middle.shape)
        limits = middle - half, middle, middle + half
        ratio = 2.0 ** rng.uniform(-4, 4)
        q, moved = (softmax(ratio * x + np.log(weight)) for x in (middle, middle + half * rng.choice([-1, 1], middle.shape)))
        bound = tempering.retempering_error(limits, ratio, weight)
        assert (0.5 * np.abs(q - moved).sum(1)).mean() <= bound <= 1


def test_where_an_error_begins_is_found_from_both_sides():
    low, high = tempering.accepted_factors(lambda factor: abs(np.log2(factor)), 1.7, (1 / 64, 64))
    assert 2**1.65 < high <= 2**1.7 and 2**-1.7 <= low < 2**-1.65
    assert tempering.accepted_factors(lambda factor: 0, 1, (0.3, 5.0)) == (0.3, 5.0)
    assert tempering.accepted_factors(lambda factor: 2, 1, (0.3, 5.0)) == pytest.approx((1, 1), rel=0.03)


def test_nothing_is_known_before_anything_is_dumped(tmp_path):
    from cache_store import arguments

    from offline_bkd.cache import create_cache

    with create_cache(tmp_path / "s", **arguments(encoding=LOGIT)) as writer:
        assert writer.cache.temperatures is None and writer.cache.summary()["temperatures"] is None
        writer.write(0, 0, answers(0))
        assert writer.cache.temperatures[0] == 0.01
