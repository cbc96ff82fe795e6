"""A view is a number, and its crop a pure function of seed, sample, view and image size."""

import math

import numpy as np
import pytest

from offline_bkd.cache import views
from offline_bkd.cache.views import CropFlip, RandomResizedCrop

CROP = RandomResizedCrop(size=224, count=8, seed=11)
GOLDEN = [
    [1, 139, 372, 325, 0],
    [1, 60, 374, 288, 1],
    [26, 196, 224, 236, 0],
    [3, 140, 214, 194, 0],
]


def boxes(specification, sample_id, view, size=(375, 500)):
    sample_id, view = np.broadcast_arrays(np.asarray(sample_id), np.asarray(view))
    return np.stack(specification.boxes(sample_id, view, np.tile(size, (len(view), 1))))


def test_crop_and_flip_enumerates_every_crop_once():
    specification = CropFlip(pad=4)
    assert specification.count == 162
    top, left, height, width, flip = boxes(specification, 0, np.arange(162), (32, 32))
    crops = {(i, j, f) for i in range(-4, 5) for j in range(-4, 5) for f in (0, 1)}
    assert set(zip(top, left, flip, strict=True)) == crops
    assert set(height) == set(width) == {32}
    assert CropFlip(pad=2, flip=False).count == 25 and not boxes(CropFlip(pad=2, flip=False), 0, np.arange(25))[4].any()


def test_golden_boxes_never_change():
    assert boxes(CropFlip(pad=4), 5, [0, 1, 2, 80, 161], (32, 32)).T.tolist() == [
        [-4, -4, 32, 32, 0],
        [-4, -4, 32, 32, 1],
        [-4, -3, 32, 32, 0],
        [0, 0, 32, 32, 0],
        [4, 4, 32, 32, 1],
    ]
    assert boxes(CROP, [0, 0, 7, 123456], [0, 1, 3, 7]).T.tolist() == GOLDEN


def test_a_box_does_not_depend_on_the_batch_it_is_asked_in():
    sample, view = np.arange(40) * 3, np.arange(40) % 8
    together = boxes(CROP, sample, view)
    order = np.random.default_rng(0).permutation(40)
    assert (boxes(CROP, sample[order], view[order]) == together[:, order]).all()
    assert all((boxes(CROP, sample[i : i + 1], view[i : i + 1])[:, 0] == together[:, i]).all() for i in range(40))


def test_boxes_lie_in_the_image_and_differ_by_sample_view_and_seed():
    for size in (375, 500), (7, 900), (900, 7), (1, 1):
        top, left, height, width, _ = boxes(CROP, np.arange(500), np.arange(500) % 8, size)
        assert (height > 0).all() and (width > 0).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + height <= size[0]).all() and (left + width <= size[1]).all()
    base = boxes(CROP, np.arange(9), 0)
    assert (boxes(CROP, np.arange(9), 1) != base).any(0).all()
    assert (boxes(RandomResizedCrop(size=224, count=8, seed=12), np.arange(9), 0) != base).any(0).all()


@pytest.mark.parametrize("size", [(375, 500), (60, 400)])
def test_random_resized_crops_are_distributed_as_torchvisions(size):
    torch, transforms = pytest.importorskip("torch"), pytest.importorskip("torchvision.transforms")
    count = 4000
    ours = boxes(CROP, np.arange(count), 0, size).astype(float)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    draw = transforms.RandomResizedCrop.get_params
    theirs = np.array([draw(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], float).T
    limit = 1.95 * math.sqrt(2 / count)  # Kolmogorov and Smirnov's, one in a thousand
    for name, a, b in zip(("top", "left", "height", "width"), ours, theirs, strict=False):
        assert _largest_gap(a, b) < limit, name
    assert _largest_gap(ours[2] * ours[3], theirs[2] * theirs[3]) < limit
    assert abs(ours[4].mean() - 0.5) < 4 * 0.5 / math.sqrt(count)


def _largest_gap(a, b):
    grid = np.union1d(a, b)
    below_a, below_b = (np.searchsorted(np.sort(drawn), grid, "right") / len(drawn) for drawn in (a, b))
    return np.abs(below_a - below_b).max()


def test_an_epoch_draws_each_samples_crop_uniformly_and_repeatably():
    drawn = CropFlip(pad=1).draw(3, 0, np.arange(20_000))
    assert (np.bincount(drawn, minlength=18) > 20_000 / 18 * 0.85).all()
    assert (CropFlip(pad=1).draw(3, 0, np.arange(20_000)[::-1]) == drawn[::-1]).all()
    assert (CropFlip(pad=1).draw(3, 1, np.arange(20_000)) != drawn).mean() > 0.9


def test_epochs_of_resized_crops_use_every_view_before_any_again():
    drawn = np.array([CROP.draw(0, epoch, np.arange(3)) for epoch in range(16)])
    assert (drawn == drawn[:, :1]).all()
    assert sorted(drawn[:8, 0]) == sorted(drawn[8:, 0]) == list(range(8))
    assert drawn[:8, 0].tolist() != drawn[8:, 0].tolist()


@pytest.mark.parametrize("specification", [CropFlip(pad=2, flip=False), CROP])
def test_a_specification_survives_json(specification):
    assert views.from_json(views.to_json(specification)) == specification


@pytest.mark.parametrize("values", [{}, {"name": "rotate"}, {"name": "crop_flip", "padding": 1}, None, []])
def test_an_unknown_specification_is_refused(values):
    with pytest.raises(ValueError, match="unknown view specification"):
        views.from_json(values)
