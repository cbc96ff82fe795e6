"""What people use from Python: a cache beside their own data set, in their own training loop."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from test_folders import folder_of_images
from test_walk import losses_of

from offline_bkd.cache import CacheError, open_cache
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.cached_targets import CachedTargets, ViewCrop, bkd_loss
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.dump import dump, dump_logits
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.teachers import load_teacher
from offline_bkd.pipeline.train import train_teacher
from offline_bkd.pipeline.training.samplers import instance_balanced
from offline_bkd.pipeline.training.targets import Targets

EXAMPLES = Path(__file__).parent.parent / "examples"


def pairs_of(train):
    return [(train.decode(row), int(train.label[row])) for row in range(len(train))]


@pytest.fixture(scope="module")
def digits():
    train, *_ = datasets.load(tiny.experiment().data)
    return train


@pytest.fixture(scope="module")
def resized(tmp_path_factory):
    """A data set of image files, and the cache of its resized crops."""
    folder = tmp_path_factory.mktemp("resized")
    folder_of_images(folder)
    config = tiny.experiment(
        f"data={{name: imagefolder, root: {folder}, workers: 0}}", "views={name: random_resized_crop, size: 8, count: 3}"
    )
    train_teacher(config, str(folder / "teacher"), tiny.CPU)
    dump_logits(config, [str(folder / "teacher")], str(folder / "cache.zarr"), tiny.CPU)
    return datasets.load(config.data).training, config, folder / "cache.zarr"


def test_a_plain_loop_has_the_losses_of_the_engine(cache, digits):
    config, steps = tiny.experiment(), 56
    data = CachedTargets(cache, pairs_of(digits), seed=config.seed)
    model = build_model(config.student.model, 10, config.data, config.seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found, epoch = [], 0
    while len(found) < steps:
        data.set_epoch(epoch)
        order = instance_balanced(config.seed, epoch, digits.sample_id).tolist()
        for batch in torch.utils.data.DataLoader(data, batch_size=64, sampler=order):
            loss = bkd_loss(model(batch.image), batch.target, batch.label, data.cache.class_counts)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            found.append(loss.item())
        epoch += 1

    def engines(rows, views, temperature):
        return targets.probability(rows, views, temperature)

    targets = Targets(open_cache(cache), tiny.CPU)
    np.testing.assert_allclose(found[:steps], losses_of(config, engines), rtol=2e-5)


def test_the_loss_is_the_papers_formula_with_any_alpha_beta_and_temperature():
    generator = torch.Generator().manual_seed(0)
    logits, answers = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    label, counts, target = torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([500, 80, 9, 2]), (answers / 4).softmax(1)
    weight = (1 - 0.99) / (1 - 0.99 ** counts.double())
    balanced = weight * target / (weight * target).sum(1, keepdim=True)
    kl = (balanced * (balanced.log() - (logits / 4).log_softmax(1))).sum(1)
    expected = (3 * 4**2 * kl - logits.log_softmax(1)[torch.arange(6), label]).mean()
    found = bkd_loss(logits, target, label, counts, temperature=4.0, alpha=3.0, beta=0.99)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_items_are_of_the_epoch_whatever_the_workers_and_the_order(cache, digits, start):
    data, store = CachedTargets(cache, pairs_of(digits), seed=3), open_cache(cache)
    options = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": start}
    loader = torch.utils.data.DataLoader(data, batch_size=100, shuffle=True, **options)
    for epoch in (0, 1, 5) if start == "fork" else (0, 1):
        data.set_epoch(epoch)
        batches = list(loader)
        assert [len(batch.label) for batch in batches] == [100, 100, 100, 100, 64]
        ids, views = (torch.cat([getattr(batch, name) for batch in batches]).numpy() for name in ("sample_id", "view"))
        order = np.argsort(ids)
        np.testing.assert_array_equal(views[order], store.views.draw(3, epoch, np.sort(ids)))
        found = torch.cat([batch.target for batch in batches]).numpy()
        planes = np.stack([store.plane(view) for view in range(store.views.count)])
        np.testing.assert_allclose(found, planes[views, np.searchsorted(store.sample_id, ids)], atol=1e-6)


def test_a_crop_has_the_pixels_that_the_teacher_saw(cache, digits, resized):
    config = tiny.experiment()
    images = open_images(digits, config.views, tiny.CPU, 0)
    rows = np.array([0, 7, 463])
    for view in range(config.views.count):
        (expected,) = images.batches(rows, np.full(3, view), 3)
        crop = ViewCrop(config.views)
        found = torch.stack([crop(digits.decode(row), int(digits.sample_id[row]), view) for row in rows])
        assert torch.equal(found, expected.images)
    train, config, _ = resized
    images = open_images(train, config.views, tiny.CPU, 0)
    for view in range(3):
        (expected,) = images.batches(np.arange(6), np.full(6, view), 6)
        crop = ViewCrop(config.views)
        found = torch.stack([crop(train.decode(row), int(train.sample_id[row]), view) for row in range(6)])
        assert torch.equal(found, expected.images)


def test_of_resized_crops_the_plane_of_the_epoch_is_held(resized):
    train, config, path = resized
    data, store = CachedTargets(path, pairs_of(train), transform=lambda crop: crop / 255), open_cache(path)
    for epoch in range(4):
        data.set_epoch(epoch)
        (view,) = {data[item].view for item in range(6)}
        np.testing.assert_allclose(np.stack([data[item].target for item in range(6)]), store.plane(view), atol=1e-6)
        assert data[0].image.max() <= 1


def test_another_temperature_is_the_engines(cache, digits):
    data = CachedTargets(cache, pairs_of(digits), temperature=4)
    targets = Targets(open_cache(cache), tiny.CPU)
    item = data[5]
    expected = targets.probability(torch.tensor([5]), torch.tensor([item.view]), 4.0)[0]
    torch.testing.assert_close(item.target, expected)


def test_data_that_are_not_the_caches_are_refused(cache, digits):
    pairs = pairs_of(digits)
    with pytest.raises(CacheError, match="has 464 samples and the data set has 463; give the cache's sample of each item"):
        CachedTargets(cache, pairs[1:])
    with pytest.raises(CacheError, match="has no sample 99999"):
        CachedTargets(cache, pairs[:1], sample_id=[99999])
    wrong = next(row for row in range(464) if pairs[row][1] != pairs[0][1])
    with pytest.raises(CacheError, match="item 0 has the label .*, but sample .* has .*; give the cache's sample"):
        CachedTargets(cache, pairs[:1], sample_id=digits.sample_id[[wrong]])[0]
    with pytest.raises(CacheError, match="item 0 is 9 x 8 pixels, but sample 0 of .* 8 x 8; give whole images, upright, as"):
        CachedTargets(cache, [(np.zeros((9, 8, 3), np.uint8), pairs[0][1]), *pairs[1:]])[0]
    part = CachedTargets(cache, pairs[7:9], sample_id=digits.sample_id[7:9])
    assert [part[item].sample_id for item in range(2)] == digits.sample_id[7:9].tolist()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0}, "serves temperatures .*, not 0; dump at that temperature"),
        ({"sample_id": np.arange(464.0) + 0.5}, "a sample is a whole number, found"),
        ({"sample_id": [1, 2]}, "sample_id names 2 samples and the data set has 464"),
        ({"seed": -1}, r"seed is a whole number from 0 to 2\^63 - 1; found -1"),
        ({"seed": 1.5}, "seed is a whole number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(cache, digits, given, message):
    with pytest.raises(ValueError, match=message):
        CachedTargets(cache, pairs_of(digits), **given)


def test_transform_coded_targets_are_the_stores(tmp_path, digits, teacher_run):
    config = tiny.experiment("cache.encoding={name: klt, max_error: 0.05}")
    dump_logits(config, [str(teacher_run)], str(tmp_path / "s"), tiny.CPU)
    data, store = CachedTargets(tmp_path / "s", pairs_of(digits)), open_cache(tmp_path / "s")
    assert store.decoder is not None
    for item in 0, 5, 463:
        np.testing.assert_allclose(data[item].target, store.plane(data[item].view)[item], atol=1e-6)


def test_an_epoch_is_a_whole_number(cache, digits):
    data = CachedTargets(cache, pairs_of(digits))
    for epoch in -1, 1.5, "3", 2**63:
        with pytest.raises(ValueError, match="epoch is a whole number from 0 to"):
            data.set_epoch(epoch)


def test_a_plane_that_was_not_read_whole_gives_no_targets(resized, monkeypatch):
    training, _, path = resized
    data, cache = CachedTargets(path, pairs_of(training)), open_cache(path)
    views = [int(cache.views.draw(0, epoch, cache.sample_id)[0]) for epoch in range(10)]
    other = next(epoch for epoch, view in enumerate(views) if view != views[0])

    def cut_short(view, out):
        out[:1] = 7
        raise CacheError("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(data.cache, "stored_plane", cut_short)
        with pytest.raises(CacheError, match="the connection was lost"):
            data.set_epoch(other)
        with pytest.raises(CacheError, match="no view of .* is loaded, since set_epoch failed; call it again"):
            data[0]
    for epoch in 0, other:
        data.set_epoch(epoch)
        np.testing.assert_allclose(data[0].target, cache.plane(views[epoch])[0], atol=1e-6)


def test_what_is_no_whole_image_or_no_view_has_no_crop():
    crop, image = ViewCrop(tiny.experiment().views), np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    planar, alone = image.transpose(2, 0, 1), image[..., 0]
    for wrong in planar, alone, image / 255, torch.from_numpy(image), "a.png", np.dstack([image, alone]):
        with pytest.raises(ValueError, match=r"an image is PIL's or uint8 \[H, W, 3\], whole and not a tensor; found a "):
            crop(wrong, 0, 0)
    for view in 9, -1, 1.5:
        with pytest.raises(ValueError, match="there is no view|a view is a whole number"):
            crop(image, 0, view)
    grey = Image.fromarray(alone.astype(np.uint16) * 257)  # 16 bits, as the dump reads them: not clipped
    assert torch.equal(crop(grey, 0, 4), torch.from_numpy(alone).expand(3, 8, 8))


def test_bkd_loss_takes_nothing_that_would_be_silently_wrong():
    logits, label, counts = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), [100, 10, 1]
    target = torch.full((4, 3), 1 / 3)
    assert torch.isfinite(bkd_loss(logits, target.half(), label, np.array(counts)))
    for message, *given in (
        (r"found logits \[4, 3\], target \[1, 3\], label \[4\], class_counts \[3\]", logits, target[:1], label, counts),
        ("takes logits .B, C., target .B, C., label .B. and class_counts .C.", logits, target, label, counts[:1]),
        ("takes logits", logits, target, target, counts),
        ("takes logits", logits[0], target[0], label[0], counts),
        ("class_counts are at least 1, found 0; leave out classes without", logits, target, label, [5, 5, 0]),
        ("the target is probabilities, which sum to 1 in each row; give those of a cache", logits, logits, label, counts),
    ):
        with pytest.raises(ValueError, match=message):
            bkd_loss(*given)
    for settings in {"temperature": 0}, {"beta": 1}, {"beta": -0.1}, {"alpha": -1}, {"temperature": float("nan")}:
        with pytest.raises(ValueError, match="temperature > 0, 0 <= beta < 1 and alpha >= 0; found"):
            bkd_loss(logits, target, label, counts, **settings)


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_example_learns(cache, digits, monkeypatch):
    plain = example("plain_loop")
    monkeypatch.setattr(plain.datasets, "load", lambda _: (digits,))
    first, *_, last = plain.main(str(cache))
    assert last < first


def test_the_lightning_example_learns(cache, digits, monkeypatch):
    pytest.importorskip("lightning", reason="needs Lightning")
    student = example("lightning_student")
    monkeypatch.setattr(student.datasets, "load", lambda _: (digits,))
    seen = student.main(str(cache))
    assert len(seen) == 3 * 8 and np.mean(seen[-8:]) < np.mean(seen[:8])


def test_any_network_in_memory_may_answer(tmp_path, digits, teacher_run, cache):
    config = tiny.experiment()
    network, _ = load_teacher(str(teacher_run), digits)
    exact = {"name": "probability", "dtype": "float32"}
    dump(network, digits, config.views, str(tmp_path / "module.zarr"), encoding=exact)
    dump(lambda images: network(images), config, config.views, str(tmp_path / "called.zarr"), encoding=exact, teacher="mine")
    expected, module, called = (open_cache(path) for path in (cache, tmp_path / "module.zarr", tmp_path / "called.zarr"))
    for view in range(config.views.count):
        np.testing.assert_array_equal(module.plane(view), expected.plane(view))
        np.testing.assert_array_equal(called.plane(view), expected.plane(view))
    assert module.identity.teacher["digest"] == expected.identity.teacher["digest"]
    assert called.identity.teacher["name"] == "mine" and called.identity.teacher["digest"] != module.identity.teacher["digest"]
    with pytest.raises(UserError, match='has no digest; say whose answers they are with teacher="…"'):
        dump(lambda images: network(images), digits, config.views, str(tmp_path / "nobody.zarr"))
    with pytest.raises(CacheError, match="is another store: teacher.digest"):
        dump(network, digits, config.views, str(tmp_path / "called.zarr"), encoding=exact, resume=True)
    dump(network, digits, config.views, str(tmp_path / "named.zarr"), encoding=exact, teacher="mine")
    other, _ = load_teacher(str(teacher_run), digits)
    torch.nn.init.zeros_(next(other.parameters()))
    with pytest.raises(CacheError, match="is another store: teacher.digest"):  # by the same name
        dump(other, digits, config.views, str(tmp_path / "named.zarr"), encoding=exact, teacher="mine", resume=True)


class Answering(torch.nn.Module):
    """A network in training mode, but for its normalisation, whose answers go through `end`."""

    def __init__(self, end=lambda logits: logits, classes: int = 10):
        super().__init__()
        self.norm, self.drop, self.fc, self.end = (
            torch.nn.BatchNorm1d(192),
            torch.nn.Dropout(),
            torch.nn.Linear(192, classes),
            end,
        )
        self.train().norm.eval()

    def forward(self, images):
        return self.end(self.fc(self.drop(self.norm(images.flatten(1) / 255))))


def test_a_network_is_lent_and_its_answers_are_those_of_evaluation(tmp_path, digits):
    network, views = Answering(), tiny.experiment().views
    for name in "a.zarr", "b.zarr":
        dump(network, digits, views, tmp_path / name)
    assert network.training and network.drop.training and not network.norm.training
    np.testing.assert_array_equal(open_cache(tmp_path / "a.zarr").plane(0), open_cache(tmp_path / "b.zarr").plane(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_a_network_answers_in_half_precision_is_softened_in_float32(tmp_path, digits, dtype):
    largest = []
    sure = Answering(lambda z: largest.append(float(300 * z.abs().max())) or 300 * z)
    half = Answering(lambda z: (300 * z).to(dtype))
    half.load_state_dict(sure.state_dict())
    exact = {"name": "probability", "dtype": "float32"}
    for name, network in ("sure", sure), ("half", half):
        dump(network, digits, tiny.experiment().views, tmp_path / name, encoding=exact)
    found, expected = (torch.from_numpy(open_cache(tmp_path / name).plane(0)) for name in ("half", "sure"))
    assert (expected < 1e-8).any()  # which float16 does not have
    rounding = max(largest) * torch.finfo(dtype).eps / 2 / 2  # of a logit over T; of its sum with the others as much
    there = expected > 1e-30
    assert (found[there].log() - expected[there].log()).abs().max() <= 2.01 * rounding


@pytest.mark.parametrize(
    ("network", "given", "message"),
    [
        (Answering(lambda z: z.softmax(1)), {}, "the network answers probabilities, not logits; leave out its softmax"),
        (Answering(lambda z: (z, z)), {}, r"answers 8 images by a tuple, not by logits \[8, 10\]; wrap it"),
        (Answering(lambda z: z[..., None]), {}, r"answers 8 images by \[8, 10, 1\], not by logits \[8, 10\]"),
        (Answering(classes=9), {}, r"answers 8 images by \[8, 9\], not"),
        (Answering(), {"temperature": float("nan")}, "^temperature: input should be a finite number; found nan$"),
        (Answering(), {"encoding": {"name": "zip"}}, "^encoding.name: 'zip' is not known; known are klt, logit, probability$"),
        (Answering(), {"views": 9}, "dump takes the data and the views of an experiment, found Dataset and int"),
        (Answering(), {"data": [1]}, "found list and CropFlip"),
        (lambda images: images, {"teacher": ""}, "has no digest; say whose answers they are"),
    ],
)
def test_what_gives_no_logits_writes_nothing(tmp_path, digits, network, given, message):
    with pytest.raises(UserError, match=message):
        dump(**{"network": network, "data": digits, "views": tiny.experiment().views, "out": tmp_path / "s"} | given)
    assert not list(tmp_path.iterdir())


def test_a_store_has_an_address():
    with pytest.raises(CacheError, match="the store's address is empty"):
        open_cache("")


def test_the_package_offers_its_interface_by_one_name():
    import offline_bkd

    assert offline_bkd.CachedTargets is CachedTargets and offline_bkd.bkd_loss is bkd_loss
    assert offline_bkd.open_cache is open_cache and offline_bkd.dump is dump
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        offline_bkd.nothing  # noqa: B018
