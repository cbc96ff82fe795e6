"""Several views a decode: the images that epochs visit together stay the same, an image file is decoded less often."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from test_folders import folder_of_images

from offline_bkd.cache import RandomResizedCrop, open_cache
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.train import train_student, train_teacher
from offline_bkd.pipeline.training import engine, samplers
from offline_bkd.pipeline.training.targets import Targets

VIEWS = RandomResizedCrop(size=8, count=7)
IDS = np.arange(10) * 3 + 1


def drawn(several: int, epoch: int, rows=lambda epoch: samplers.instance_balanced(5, epoch, IDS)):
    settings = SimpleNamespace(views_per_decode=several)
    task = SimpleNamespace(training=settings, method=SimpleNamespace(rows=rows), views=VIEWS, seed=5, sample_id=IDS)
    return engine._draw(task, epoch)


@pytest.mark.parametrize("several", [2, 3, 4, 10])
def test_epochs_visit_together_what_they_would_one_by_one(several):
    for start in range(0, 3 * several, several):
        epochs = [drawn(several, epoch) for epoch in range(start, start + several)]
        assert all(len(rows) == len(IDS) for rows, _ in epochs), "an epoch is as long as ever"
        together, apart = Counter(), Counter()
        for epoch, (rows, views) in enumerate(epochs, start):
            together.update(zip(rows.tolist(), views.tolist()))
            apart.update(zip(*(values.tolist() for values in drawn(1, epoch))))
        assert together == apart
        order = np.concatenate([rows for rows, _ in epochs]).reshape(-1, several)
        assert (order == order[:, :1]).all(), "the views of a sample follow each other"


def test_one_view_a_decode_is_every_samplers_own_order():
    label, weight = np.arange(10) % 3, np.array([1.0, 4.0, 2.0])
    for sampler in (
        lambda epoch: samplers.instance_balanced(5, epoch, IDS),
        lambda epoch: samplers.class_sampled(5, epoch, label, weight),
    ):
        for epoch in range(9):
            rows, views = drawn(1, epoch, sampler)
            np.testing.assert_array_equal(rows, sampler(epoch))
            np.testing.assert_array_equal(views, VIEWS.draw(5, epoch, IDS[rows], samplers.occurrence(rows)))


def folder_experiment(root, *overrides):
    return tiny.experiment(
        f"data={{name: imagefolder, root: {root}, workers: 0}}",
        "views={name: random_resized_crop, size: 8, count: 3}",
        "student.training={epochs: 4, batch_size: 4, views_per_decode: 2}",
        "student.method={name: kd}",
        tiny.EXACT,
        *overrides,
    )


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with six images to train on, and the cache of a teacher's answers to them."""
    root = tmp_path_factory.mktemp("images")
    folder_of_images(root)
    config = folder_experiment(root)
    train_teacher(config, str(root / "teacher"), tiny.CPU)
    dump_logits(config, [str(root / "teacher")], str(root / "cache.zarr"), tiny.CPU)
    return root


def trained(images, out, *overrides, device=tiny.CPU) -> str:
    train_student(folder_experiment(images, *overrides), str(images / "cache.zarr"), str(out), device, resume=True)
    return runs.open_run(out).summary()["digest"]


def test_a_file_is_decoded_once_for_its_views_and_each_has_its_own_target(images, tmp_path, monkeypatch):
    decoded, asked, epochs, train_epoch = [], [], [], engine.train_epoch
    decode, probability, cache = datasets.Dataset.decode, Targets.probability, open_cache(images / "cache.zarr")

    def epoch(*given):
        decoded.clear()
        record = train_epoch(*given)
        epochs.append(list(decoded))
        return record

    def target(self, rows, views, temperature=None):
        values = probability(self, rows, views, temperature)
        asked.append(rows.tolist())
        np.testing.assert_array_equal(values, cache.rows(rows.numpy(), views.numpy()))
        return values

    monkeypatch.setattr(datasets.Dataset, "decode", lambda self, row: decoded.append(row) or decode(self, row))
    monkeypatch.setattr(engine, "train_epoch", epoch), monkeypatch.setattr(Targets, "probability", target)
    trained(images, tmp_path / "s")
    assert [len(files) for files in epochs] == [3, 3, 3, 3], "six crops of three files"
    assert sorted(epochs[0] + epochs[1]) == sorted(epochs[2] + epochs[3]) == [0, 1, 2, 3, 4, 5]
    assert [len(rows) for rows in asked] == [4, 2] * 4 and all(rows[0::2] == rows[1::2] for rows in asked)


def test_a_resumed_run_and_one_with_workers_have_the_same_bits(images, tmp_path, device):
    whole = trained(images, tmp_path / "whole", device=device)
    for epochs in 1, 2:  # in the middle of epochs that belong together, and at their end
        with tiny.interrupted_after(epochs):
            trained(images, tmp_path / f"cut-{epochs}", device=device)
        assert trained(images, tmp_path / f"cut-{epochs}", device=device) == whole
    assert trained(images, tmp_path / "workers", "data.workers=2", device=device) == whole
    other = trained(images, tmp_path / "one", "student.training.views_per_decode=1", device=device)
    assert other != whole, "another order"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.training.epochs=5", "views_per_decode 2 .* 5 epochs would leave some out; make epochs a multiple of it"),
        ("views={name: crop_flip}", "crop_flip keeps decoded images in memory: .* gains nothing there; leave it out"),
        ("student.method={name: cbd}", "method cbd draws samples one by one, each under one view: leave out"),
        ("student.method={name: ce, sampler: class_balanced}", "method ce draws samples one by one"),
        ("student.training.views_per_decode=0", "views_per_decode"),
    ],
)
def test_where_views_cannot_follow_each_other_they_are_refused(tmp_path, override, message):
    cosine = "student.model.cosine_scale=20"
    with pytest.raises(UserError, match=message) as stop:
        folder_experiment(tmp_path, override, *([cosine] if "cbd" in override else []))
    assert "\n" not in str(stop.value)
