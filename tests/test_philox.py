"""Random numbers are Philox4x32-10, counted and keyed, and nothing else."""

import numpy as np
import pytest

from offline_bkd.cache import philox

VECTORS = [  # the known answers that are published with Random123
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return tuple(int(word, 16) for word in text.split())


@pytest.mark.parametrize("counter, key, answer", VECTORS)
def test_published_known_answers(counter, key, answer):
    assert tuple(philox.philox4x32(words(counter), words(key)).tolist()) == words(answer)


def test_counters_broadcast_and_each_is_drawn_alone():
    first, second = np.arange(5)[:, None], np.arange(3)
    together = philox.draw(7, philox.VIEW, first, second)
    assert together.shape == (4, 5, 3) and together.dtype == np.uint32
    assert (together[:, 4, 2] == philox.draw(7, philox.VIEW, 4, 2)).all()


def test_streams_differ_by_seed_purpose_sample_and_number():
    base = philox.draw(1, philox.VIEW, 2, 3, 4)
    others = [(2, philox.VIEW, 2, 3, 4), (1, philox.BOX, 2, 3, 4), (1, philox.VIEW, 9, 3, 4), (1, philox.VIEW, 2, 3, 5)]
    assert all((philox.draw(*other) != base).any() for other in others)
    assert (philox.draw(1 + (1 << 32), philox.VIEW, 2, 3, 4) != base).any()  # all 64 bits of a seed count


def test_below_is_uniform_and_in_range():
    drawn = philox.below(philox.draw(0, philox.VIEW, np.arange(50_000)), 162)
    counts = np.bincount(drawn.ravel(), minlength=162)
    expected = drawn.size / 162
    assert len(counts) == 162
    assert ((counts - expected) ** 2 / expected).sum() < 161 + 4 * np.sqrt(2 * 161)  # chi squared, four deviations
    assert philox.below(np.uint32([0, 2**32 - 1]), 10).tolist() == [0, 9]


def test_a_permutation_holds_everything_once_and_does_not_depend_on_the_order_asked():
    items = np.arange(1000) * 3
    order = philox.permutation(5, philox.ORDER, items)
    assert sorted(order.tolist()) == list(range(1000))
    back = philox.permutation(5, philox.ORDER, items[::-1].copy())
    assert (items[order] == items[::-1][back]).all()
    assert (order != philox.permutation(5, philox.ORDER, items, second=1)).any()
