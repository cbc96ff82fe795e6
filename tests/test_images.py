"""Crops: the same bits for every batch size and order, and the crop that the view's number names."""

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pictures import png
from PIL import Image
from test_folders import folder_of_images
from torchvision.transforms.v2 import functional as transforms

from offline_bkd.cache.views import CropFlip, RandomResizedCrop
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.data import datasets, images
from offline_bkd.pipeline.data.images import DecodedImages, ResidentImages, open_images

FLIPPED = CropFlip(pad=2, flip=True)
RESIZED = RandomResizedCrop(size=6, count=5)


@pytest.fixture(scope="module")
def digits():
    return datasets.load(tiny.experiment().data)[0]


@pytest.fixture
def folder(tmp_path):
    return datasets.load(folder_of_images(tmp_path))[0]


def collect(images, rows, views, batch_size) -> torch.Tensor:
    return torch.cat([batch.images for batch in images.batches(np.array(rows), np.array(views), batch_size)])


def test_a_crop_is_what_padding_cropping_and_mirroring_give(digits):
    images = ResidentImages(digits, FLIPPED, tiny.CPU)
    for row, view in [(0, 0), (3, 1), (5, 24), (7, 49), (9, 31)]:
        top, left, mirrored = view // 10, view // 2 % 5, view % 2
        expected = torch.from_numpy(np.asarray(digits.decode(row)).copy()).permute(2, 0, 1)
        expected = transforms.crop(transforms.pad(expected, [2]), top, left, 8, 8)
        expected = transforms.horizontal_flip(expected) if mirrored else expected
        assert torch.equal(collect(images, [row], [view], 1)[0], expected)


@pytest.mark.parametrize("kind", ["resident", "decoded"])
def test_a_view_has_the_same_bits_for_every_batch_size_order_and_worker(kind, digits, folder):
    dataset, views, workers = (digits, FLIPPED, 0) if kind == "resident" else (folder, RESIZED, 2)
    rows, numbers = np.arange(6).repeat(5), np.tile(np.arange(5), 6)
    whole = collect(open_images(dataset, views, tiny.CPU, 0), rows, numbers, 30)
    for batch_size in (1, 7):
        assert torch.equal(collect(open_images(dataset, views, tiny.CPU, workers), rows, numbers, batch_size), whole)
    order = np.random.default_rng(0).permutation(30)
    shuffled = collect(open_images(dataset, views, tiny.CPU, 0), rows[order], numbers[order], 4)
    assert torch.equal(shuffled, whole[order])


def test_a_resized_crop_is_the_box_that_the_view_names(folder):
    images = DecodedImages(folder, RESIZED, tiny.CPU, 0)
    boxes = RESIZED.boxes(folder.sample_id[[4]], np.array([3]), folder.image_size[[4]])
    top, left, height, width, flip = (int(value[0]) for value in boxes)
    crop = folder.decode(4).crop((left, top, left + width, top + height)).resize((6, 6), Image.Resampling.BILINEAR)
    expected = np.asarray(crop)[:, :: -1 if flip else 1]
    np.testing.assert_array_equal(collect(images, [4], [3], 1)[0].permute(1, 2, 0), expected)


def test_consecutive_views_of_a_sample_decode_it_once(folder, monkeypatch):
    decoded, decode = [], datasets.Dataset.decode
    images = DecodedImages(folder, RESIZED, tiny.CPU, 0)
    monkeypatch.setattr(datasets.Dataset, "decode", lambda self, row: decoded.append(row) or decode(self, row))
    collect(images, np.arange(6).repeat(5), np.tile(np.arange(5), 6), 15)
    assert decoded == [0, 1, 2, 3, 4, 5]


def test_images_that_stay_on_the_device_are_opened_once(tmp_path, monkeypatch):
    from test_parquet import parquet, section

    parquet(tmp_path, [0, 1, 1])
    parquet(tmp_path, [0, 1], "test-0.parquet")
    train, _, _ = datasets.load(section(tmp_path))
    opened, open_image = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **values: opened.append(1) or open_image(*args, **values))
    images = ResidentImages(train, FLIPPED, tiny.CPU)
    assert len(opened) == 4, "the first one also for its size, which says how much memory all take"
    assert images.image_size.tolist() == [[5, 6]] * 3
    assert images.crop(torch.arange(3), None)[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_broken_images_are_all_named_before_any_stays_on_the_device(tmp_path):
    from test_parquet import parquet, section

    parquet(tmp_path, [0, 1, 1, 0, 1, 0], images=[b"", png(1), b"no", b"image", png(4), b"here"])
    parquet(tmp_path, [0, 1], "test-0.parquet")
    train, _, _ = datasets.load(section(tmp_path))
    message = r"sample 0 cannot be read.*; .* sample 2 .*; .* sample 3 .* \(and 1 more\): replace or remove them"
    with pytest.raises(UserError, match=message):
        open_images(train, FLIPPED, tiny.CPU, 0)


def test_without_views_images_are_whole(digits, folder):
    resident = next(iter(ResidentImages(digits, FLIPPED, tiny.CPU).batches(np.arange(3), None, 3)))
    np.testing.assert_array_equal(resident.images.permute(0, 2, 3, 1), [np.asarray(digits.decode(row)) for row in range(3)])
    assert resident.label.tolist() == digits.label[:3].tolist() and resident.views is None
    decoded = next(iter(DecodedImages(folder, RESIZED, tiny.CPU, 0).batches(np.arange(3), None, 3)))
    assert decoded.images.shape == (3, 3, 6, 6)


def test_images_of_several_sizes_are_refused_where_they_must_be_equal(folder):
    with pytest.raises(
        UserError, match=r"crop_flip needs images of one size, but .*png is \[8, 1[12]\] .*random_resized_crop"
    ):
        open_images(folder, FLIPPED, tiny.CPU, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_later_stops_the_work_by_name(folder, workers):
    images = DecodedImages(folder, RESIZED, tiny.CPU, workers)
    Path(folder.images[2]).write_bytes(b"gone")
    with pytest.raises(UserError, match=r"^[^\n]*2\.png cannot be read as an image[^\n]*$"):
        collect(images, [0, 1, 2], [0, 0, 0], 2)


def test_images_that_would_not_fit_into_memory_are_refused_before_it_is_filled(folder, digits, monkeypatch):
    monkeypatch.setattr("offline_bkd.pipeline.data.images.memory_limit", lambda: 2**20)
    small = digits.take(np.arange(100))
    assert ResidentImages(small, FLIPPED, tiny.CPU).padded.nbytes == 100 * 12 * 12 * 3
    monkeypatch.setattr("offline_bkd.pipeline.data.images.memory_limit", lambda: 100 * 12 * 12 * 3 - 1)
    with pytest.raises(UserError, match="crop_flip keeps all images in memory: .* GiB, and there are .*random_resized_crop"):
        ResidentImages(small, FLIPPED, tiny.CPU)


def test_images_that_would_not_fit_are_refused_before_they_are_decoded(digits, monkeypatch):
    monkeypatch.setattr(images, "memory_limit", lambda: 10)
    monkeypatch.setattr("offline_bkd.pipeline.data.dataset.Dataset.decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(
        UserError, match="^crop_flip keeps all images in memory: [^;]*; use views: {name: random_resized[^;]*$"
    ):
        ResidentImages(digits, FLIPPED, tiny.CPU)


@pytest.mark.cuda
def test_crops_on_a_cuda_device_are_those_of_the_cpu(digits):
    rows, views = np.arange(50), np.arange(50)
    cuda = collect(ResidentImages(digits, FLIPPED, torch.device("cuda")), rows, views, 16)
    assert torch.equal(cuda.cpu(), collect(ResidentImages(digits, FLIPPED, tiny.CPU), rows, views, 50))
