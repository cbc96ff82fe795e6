"""Samplers: exact in expectation, pure functions of seed and epoch; a sample that comes again is seen under another view."""

import numpy as np
import pytest
from scipy.stats import chisquare

from offline_bkd.cache import philox
from offline_bkd.cache.views import CropFlip, RandomResizedCrop
from offline_bkd.pipeline.training import samplers

COUNTS = np.array([500, 60, 9, 1])
LABEL = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


def drawn(weight, epochs=40) -> np.ndarray:
    return np.concatenate([samplers.class_sampled(3, epoch, LABEL, weight) for epoch in range(epochs)])


@pytest.mark.parametrize("weight", [np.ones(4), samplers.reverse_weight(COUNTS), np.array([1, 0, 2, 0.5])])
def test_classes_come_in_proportion_to_their_weights_and_samples_alike(weight):
    rows = drawn(weight)
    expected = weight / weight.sum()
    seen = np.bincount(LABEL[rows], minlength=4)
    assert (seen[expected == 0] == 0).all()
    assert chisquare(seen[expected > 0], len(rows) * expected[expected > 0]).pvalue > 1e-3
    largest = np.bincount(rows, minlength=len(LABEL))[LABEL == 0]
    assert chisquare(largest).pvalue > 1e-3, "every sample of a class is as likely"


def test_reverse_sampling_weighs_by_the_inverse_class_size():
    np.testing.assert_allclose(samplers.reverse_weight(COUNTS), [1, 500 / 60, 500 / 9, 500])


def test_an_epoch_is_a_function_of_seed_and_number():
    weight = np.ones(4)
    first = samplers.class_sampled(3, 7, LABEL, weight)
    assert len(first) == len(LABEL)
    np.testing.assert_array_equal(first, samplers.class_sampled(3, 7, LABEL, weight))
    assert not np.array_equal(first, samplers.class_sampled(3, 8, LABEL, weight))
    assert not np.array_equal(first, samplers.class_sampled(4, 7, LABEL, weight))


def test_occurrences_are_counted_in_order():
    np.testing.assert_array_equal(samplers.occurrence(np.array([5, 2, 5, 5, 2, 9])), [0, 0, 1, 2, 1, 0])
    assert len(samplers.occurrence(np.array([], np.int64))) == 0


def test_a_sample_that_comes_again_is_seen_under_views_of_its_own():
    ids = np.full(5000, 11)
    views = CropFlip()
    found = views.draw(0, 2, ids, samplers.occurrence(ids))
    assert chisquare(np.bincount(found, minlength=162)).pvalue > 1e-3
    # the first time it is what it always was
    assert found[0] == philox.below(philox.draw(0, philox.VIEW, np.array([11]), 2)[0], 162)[0]
    crops = RandomResizedCrop(size=8, count=6)
    again = crops.draw(0, 6, ids[:6], samplers.occurrence(ids[:6]))
    assert sorted(again.tolist()) == list(range(6)), "each view once before any comes again"
    np.testing.assert_array_equal(crops.draw(0, 7, ids[:1]), again[1:2])
