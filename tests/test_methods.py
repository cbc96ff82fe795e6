"""Methods that need more than logits: trained from end to end on a tiny experiment, resumed, refused."""

import json
import re
import shutil

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from offline_bkd.cache import Cache, CacheError, open_cache
from offline_bkd.pipeline import UserError, dry_run, runs, schema
from offline_bkd.pipeline.data.color_jitter import ColorJitter, adjust
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.evaluate import ask_run
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.requirements import notes_on_training
from offline_bkd.pipeline.show.report import write_report
from offline_bkd.pipeline.train import train_student, train_teacher
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.training.targets import Targets
from offline_bkd.pipeline.verify import verify_cache

BBN = ("student.method={name: bbn}", "student.model.branches=2")
CBD = ("student.method={name: cbd}", "student.model.cosine_scale=20", "cache.features=true")


def weights(folder, name="last"):
    return runs.Run(folder).load_tensors(name)[0]


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory, teacher_run):
    """A cache with the features of two teachers, one of them trained with strong colour augmentation."""
    folder = tmp_path_factory.mktemp("ensemble")
    train_teacher(tiny.experiment("teacher.color_jitter=strong", seed=1), str(folder / "jittered"), tiny.CPU)
    teachers = [str(teacher_run), str(folder / "jittered")]
    dump_logits(tiny.experiment("cache.features=true"), teachers, str(folder / "both.zarr"), tiny.CPU)
    return folder / "both.zarr"


def test_a_new_classifier_on_a_runs_backbone(tmp_path, teacher_run):
    config = tiny.experiment("student.method={name: crt}")
    train_student(config, None, str(tmp_path / "crt"), tiny.CPU, backbone=str(teacher_run))
    before, after = weights(teacher_run), weights(tmp_path / "crt")
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["network.fc.bias", "network.fc.weight"]
    with pytest.raises(UserError, match="learns from a backbone; name one with --backbone"):
        train_student(config, None, str(tmp_path / "none"), tiny.CPU)
    with pytest.raises(UserError, match="method ce learns from no backbone; leave out --backbone"):
        train_student(
            tiny.experiment("student.method.name=ce"), None, str(tmp_path / "ce"), tiny.CPU, backbone=str(teacher_run)
        )
    wider = tiny.experiment("student.method={name: crt}", "student.model.width=6")
    with pytest.raises(UserError, match="is another network than the new one: width was 4 and is now 6; give the same model"):
        train_student(wider, None, str(tmp_path / "wider"), tiny.CPU, backbone=str(teacher_run))
    assert not (tmp_path / "wider").exists()


def test_features_of_several_teachers_teach_a_student(tmp_path, ensemble):
    config = tiny.experiment(*CBD, "student.model.projection=32", "student.training.epochs=4")
    train_student(config, str(ensemble), str(tmp_path / "cbd"), tiny.CPU)
    distance = [record["distance"] for record in runs.Run(tmp_path / "cbd").metrics()]
    assert distance[-1] < 0.9 * distance[0], "its features come closer to the teachers'"
    with pytest.raises(UserError, match="are 16 wide, .* together 32; set student.model.projection=32"):
        train_student(tiny.experiment(*CBD), str(ensemble), str(tmp_path / "narrow"), tiny.CPU)
    assert not (tmp_path / "narrow").exists()


def test_a_cache_without_features_is_refused(tmp_path, cache):
    with pytest.raises(CacheError, match="holds no features, which method cbd learns from"):
        train_student(tiny.experiment(*CBD), str(cache), str(tmp_path / "cbd"), tiny.CPU)
    with pytest.raises(CacheError, match="holds no features"):
        Targets(open_cache(cache), tiny.CPU, features=True)


def test_targets_are_the_teachers_features_side_by_side(ensemble):
    store, rows, views = open_cache(ensemble), np.array([0, 463, 7]), np.array([1, 8, 4])
    parts = [[store.feature_plane(name, view)[row] for row, view in zip(rows, views)] for name in store.features]
    targets = Targets(store, tiny.CPU, features=True)
    found = targets.features(torch.from_numpy(rows), torch.from_numpy(views))
    np.testing.assert_allclose(found, np.concatenate(parts, axis=1) / np.sqrt(2), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_two_branches_learn(tmp_path):
    config = tiny.experiment(*BBN, "student.training.epochs=4", "student.training.batch_size=64")
    train_student(config, None, str(tmp_path / "bbn"), tiny.CPU)
    first, *_, last = runs.Run(tmp_path / "bbn").metrics()
    assert last["loss"] < first["loss"]
    assert runs.open_run(tmp_path / "bbn").summary()["last"]["top1"] > 20


@pytest.mark.parametrize(("final_share", "uniform"), [(0.0, 1 - (45 / 90) ** 2), (0.19, 1 - (45 / 100) ** 2)])
def test_the_uniform_branch_gives_up_its_share_over_the_epochs(final_share, uniform):
    """All of it in the paper; in the public code for iNaturalist as if 90 epochs were 100."""
    model = build_model(tiny.experiment(*BBN).student.model, 10, schema.Digits(name="digits"), 0)
    context = Context(
        model=model,
        sample_id=np.arange(10),
        label=np.arange(10),
        class_counts=np.ones(10, np.int64),
        targets=None,
        epochs=90,
        seed=0,
        device=tiny.CPU,
    )
    even, odd = torch.rand(2, 4, 16, generator=torch.Generator().manual_seed(0))
    label = torch.arange(8)
    method = build_method(schema.BBN(name="bbn", final_share=final_share), context)
    found = method.loss((even, odd), Batch(rows=None, views=None, label=label, images=None), 45)
    weight, bias = model.network.fc.weight, model.network.fc.bias
    logits = 2 * uniform * even @ weight[:, :16].T + 2 * (1 - uniform) * odd @ weight[:, 16:].T + bias
    log_p = torch.log_softmax(logits, 1)
    pairs = torch.arange(4)
    expected = -uniform * log_p[pairs, label[0::2]] - (1 - uniform) * log_p[pairs, label[1::2]]
    torch.testing.assert_close(found.loss, expected.repeat_interleave(2))


def test_two_branches_of_torchvisions_resnet_learn_and_score_as_they_were_saved(tmp_path):
    config = tiny.experiment(
        "student.model={name: torchvision, architecture: resnet10, branches: 2}",
        "student.method={name: bbn}",
        "views={name: random_resized_crop, size: 32, count: 2, scale: [0.8, 1]}",
        "data.max_per_class=40",
        "student.training.learning_rate=0.003",
        "student.training.batch_size=32",
        "student.training.epochs=3",
        seed=1,  # another than the one that a network is built from to be scored
    )
    train_student(config, None, str(tmp_path / "run"), tiny.CPU)
    first, *_, last = runs.Run(tmp_path / "run").metrics()
    assert last["train_top1"] > 1.2 * first["train_top1"]
    scores = runs.open_run(tmp_path / "run").summary()["last"]
    assert scores["top1"] > 15 and scores.pop("epoch") == 3
    assert ask_run(str(tmp_path / "run"), "last", (), tiny.CPU).scores == scores


@pytest.mark.parametrize("method", ["crt", "cbd", "bbn", "jittered"])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, teacher_run, ensemble, method, device):
    settings = {
        "crt": ("student.method={name: crt}",),
        "cbd": (*CBD, "student.model.projection=32"),
        "bbn": BBN,
        "jittered": ("teacher.color_jitter=strong",),
    }
    config = tiny.experiment(*settings[method], "student.training.epochs=3", "teacher.training.epochs=3")

    def work(folder, resume=False):
        if method == "jittered":
            return train_teacher(config, str(folder), device, resume=resume)
        cache = str(ensemble) if method == "cbd" else None
        backbone = str(teacher_run) if method == "crt" else None
        train_student(config, cache, str(folder), device, backbone=backbone, resume=resume)

    work(tmp_path / "whole")
    with tiny.interrupted_after(1):
        work(tmp_path / "cut")
    with tiny.epochs_trained() as again:
        work(tmp_path / "cut", resume=True)
    assert again == [2, 3]
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_network_learns_from_the_jittered_colours(tmp_path):
    for name, settings in {"plain": [], "jittered": ["teacher.color_jitter=strong"]}.items():
        train_teacher(tiny.experiment("teacher.training.epochs=1", *settings), str(tmp_path / name), tiny.CPU)
    plain, jittered = weights(tmp_path / "plain"), weights(tmp_path / "jittered")
    assert not torch.equal(plain["network.fc.weight"], jittered["network.fc.weight"])


def test_colours_change_as_torchvision_changes_them():
    from torchvision.transforms.v2 import functional

    images = torch.rand(8, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor(
        [[0.2, 1.0, 1.8, 0.5, 1.3, 1.0, 1.0, 1.0], [1.8, 0.3, 1, 1, 1, 1, 1, 1], [1, 1.7, 0.2, 0, 1, 1, 1, 1]]
    )
    turn = torch.tensor([0.0, 0.2, -0.2, 0.1, 0.05, 0.0, 0.2, -0.13])
    found = adjust(images, *factors.view(3, 8, 1, 1, 1), turn.view(8, 1, 1, 1))
    for place, image in enumerate(images):
        expected = functional.adjust_brightness(image, factors[0, place].item())
        expected = functional.adjust_contrast(expected, factors[1, place].item())
        expected = functional.adjust_saturation(expected, factors[2, place].item())
        expected = functional.adjust_hue(expected, turn[place].item())
        np.testing.assert_allclose(found[place], expected, atol=2e-4)


def test_only_training_images_are_jittered_each_by_its_own_draw():
    images = torch.randint(0, 256, (256, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    network = ColorJitter(torch.nn.Identity(), "strong")
    torch.manual_seed(0)
    seen = network.train()(images)
    same = (seen == images).flatten(1).all(1).float().mean().item()
    grey = ((seen[:, 0] == seen[:, 1]) & (seen[:, 1] == seen[:, 2])).flatten(1).all(1).float().mean().item()
    assert same == pytest.approx(0.2 * 0.8, abs=0.06) and grey == pytest.approx(0.2, abs=0.06)
    assert seen.dtype == torch.uint8 and seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(network.eval()(images), images)


def test_mild_jitter_changes_every_image_in_all_but_hue():
    """Brightness, contrast and saturation, by factors of 0.6 to 1.4 each."""
    colour = torch.tensor([148, 128, 108], dtype=torch.uint8).view(1, 3, 1, 1).expand(2000, 3, 2, 2)  # nothing is cut off
    torch.manual_seed(0)
    seen = ColorJitter(torch.nn.Identity(), "mild").train()(colour)[:, :, 0, 0].double()
    red, green, blue = seen.T
    assert ((red > green) & (green > blue)).all(), "never grey"
    assert ((green - (red + blue) / 2).abs() <= 1).all(), "the hue stays, but for rounding"
    luma = torch.tensor([0.2989, 0.587, 0.114]).double()
    brightness = seen @ luma / (colour[0, :, 0, 0].double() @ luma)
    chroma = (red - blue) / 40 / brightness  # contrast and saturation move one colour alike
    assert 0.59 < brightness.min() < 0.61 and 1.39 < brightness.max() < 1.41
    assert brightness.mean() == pytest.approx(1, abs=0.02) and brightness.std() == pytest.approx(0.8 / 12**0.5, abs=0.01)
    assert 0.3 < chroma.min() < 0.5 and 1.7 < chroma.max() < 2
    assert chroma.mean() == pytest.approx(1, abs=0.03) and chroma.var() == pytest.approx((1 + 0.16 / 3) ** 2 - 1, abs=0.02)


def test_a_backbone_of_another_model_is_told_what_differs(tmp_path, teacher_run):
    for override, said in (
        ("student.model.depth=14", "depth was 8 and is now 14"),
        ("student.model.projection=12", "projection was None and is now 12"),
    ):
        config = tiny.experiment("student.method={name: crt}", override)
        with pytest.raises(UserError, match=f"teacher is another network than the new one: {said}.*; give the same model"):
            train_student(config, None, str(tmp_path / "crt"), tiny.CPU, backbone=str(teacher_run))
    bbn = tiny.experiment("student.method={name: bbn}", "student.model.branches=2", "student.training.epochs=1")
    train_student(bbn, None, str(tmp_path / "bbn"), tiny.CPU)
    with pytest.raises(UserError, match="is of method bbn, whose network has parts that a backbone has not"):
        crt = tiny.experiment("student.method={name: crt}")
        train_student(crt, None, str(tmp_path / "crt"), tiny.CPU, backbone=str(tmp_path / "bbn"))
    assert not (tmp_path / "crt").exists()


@pytest.mark.parametrize("scale, noted", [("null", True), ("20", False)])
def test_cbd_notes_teachers_whose_classifier_is_linear(tmp_path, scale, noted):
    config = tiny.experiment(*CBD, f"teacher.model.cosine_scale={scale}", "teacher.training.epochs=1")
    train_teacher(config, str(tmp_path / "teacher"), tiny.CPU)
    dump_logits(config, [str(tmp_path / "teacher")], str(tmp_path / "c.zarr"), tiny.CPU)
    with tiny.interrupted_after(1):
        train_student(config, str(tmp_path / "c.zarr"), str(tmp_path / "cbd"), tiny.CPU)
    train_student(config, str(tmp_path / "c.zarr"), str(tmp_path / "cbd"), tiny.CPU, resume=True)
    notes = [line for line in (tmp_path / "cbd" / "log.txt").read_text().splitlines() if "note: " in line]
    assert len(notes) == noted
    assert all("linear is that of the cache's cifar_resnet of method ce, seed 0" in line for line in notes)


@pytest.mark.parametrize("method, teacher, noted", [("bkd", "ldam", True), ("kd", "ldam", False), ("bkd", "ce", False)])
def test_bkd_notes_a_teacher_that_is_balanced_already(tmp_path, method, teacher, noted):
    config = tiny.experiment(
        f"teacher.method={{name: {teacher}}}",
        "teacher.model.cosine_scale=20",
        "teacher.training.epochs=1",
        "student.training.epochs=1",
        f"student.method={{name: {method}}}",
    )
    train_teacher(config, str(tmp_path / "teacher"), tiny.CPU)
    dump_logits(config, [str(tmp_path / "teacher")], str(tmp_path / "c.zarr"), tiny.CPU)
    train_student(config, str(tmp_path / "c.zarr"), str(tmp_path / "student"), tiny.CPU)
    notes = [line for line in (tmp_path / "student" / "log.txt").read_text().splitlines() if "note: " in line]
    assert len(notes) == noted
    assert all("already are those of the cache's cifar_resnet of method ldam, seed 0" in line for line in notes)


@pytest.mark.parametrize("averaged", [False, True])
def test_a_store_from_before_methods_were_kept_has_a_teacher_of_an_unknown_one(cache, averaged):
    old = open_cache(cache)
    teacher = old.identity.teacher
    del teacher["method"]
    if averaged:
        teacher["average_of"] = [dict(teacher)]
    assert not notes_on_training(tiny.experiment().student, old)
    (note,) = notes_on_training(tiny.experiment(*CBD).student, old)
    assert "linear is that of the cache's cifar_resnet of method unknown, seed 0" in note


def test_the_new_classifier_starts_anew(tmp_path, teacher_run):
    still = tiny.experiment("student.method={name: crt}", "student.training.learning_rate=1e-30", seed=3)
    train_student(still, None, str(tmp_path / "crt"), tiny.CPU, backbone=str(teacher_run))
    fresh = build_model(still.student.model, 10, still.data, 3).state_dict()
    found = weights(tmp_path / "crt")
    assert torch.equal(found["network.fc.weight"], fresh["network.fc.weight"])
    assert not torch.equal(found["network.conv1.weight"], fresh["network.conv1.weight"])


def test_a_sample_that_an_epoch_repeats_is_seen_under_several_views(tmp_path, ensemble, monkeypatch):
    asked = []
    gather = Targets._gather
    monkeypatch.setattr(
        Targets, "_gather", lambda self, rows, views: (asked.append(torch.stack([rows, views])), gather(self, rows, views))[1]
    )
    config = tiny.experiment(*CBD, "student.model.projection=32", "student.training.epochs=1")
    train_student(config, str(ensemble), str(tmp_path / "cbd"), tiny.CPU)
    rows, views = torch.cat(asked, dim=1).numpy()
    assert len(rows) == 464
    commonest = np.bincount(rows).argmax()
    assert len(set(views[rows == commonest])) > 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("views={name: random_resized_crop, size: 16, count: 2}", "views.count was None and is now 2"),
        ("views.pad=2", "views.pad was 1 and is now 2"),
        ("teacher.model.depth=14", "teacher.model.depth was 8 and is now 14"),
        ("teacher.expert=few", "teacher.expert was None and is now 'few'"),
        ("data.imbalance_ratio=5", "data.imbalance_ratio was 20.0 and is now 5.0"),
        ("data.mean=[0, 0, 0]", "data.mean was [0.305, 0.305, 0.305] and is now [0.0, 0.0, 0.0]"),
        ("seed=4", "seed was 0 and is now 4"),
        ("student.training.precision=bfloat16", "student.training.precision was 'float32' and is now 'bfloat16'"),
    ],
)
def test_scoring_again_refuses_what_is_another_network_or_has_no_effect(teacher_run, override, message):
    with pytest.raises(UserError, match="is scored as it was trained, but " + re.escape(message)) as error:
        ask_run(str(teacher_run), "last", (override,), tiny.CPU)
    assert "-o may say where its test images are (data) and teacher.training.precision" in str(error.value)


def test_other_test_images_are_scored_by_the_shot_groups_that_the_network_was_trained_on(tmp_path):
    def part(name, counts, side, colours=range(3)):
        for colour, count in zip(colours, counts):
            (tmp_path / name / "rgb"[colour]).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = np.zeros((side, side, 3), np.uint8)
                pixels[..., colour] = 150 + number % 100
                Image.fromarray(pixels).save(tmp_path / name / "rgb"[colour] / f"{number}.png")

    part("train", (101, 20, 5), 8), part("test", (2, 2, 2), 8), part("more", (3, 4, 5), 8), part("large", (2, 2, 2), 16)
    part("fewer", (2, 2, 2), 8)
    data = f"data={{name: imagefolder, root: {tmp_path}, train: train, test: test, workers: 0}}"
    for expert in "null", "medium":
        run = str(tmp_path / expert)
        train_teacher(tiny.experiment(data, f"teacher.expert={expert}", "teacher.training.epochs=1"), run, tiny.CPU)
        scores = ask_run(run, "last", ("data.train=fewer", "data.test=more", "data.workers=1"), tiny.CPU).scores
        groups = [scores[shot] is not None for shot in ("many", "medium", "few")]
        assert groups == ([True] * 3 if expert == "null" else [False, True, False]), "not those of data.train=fewer"
        assert scores["per_class"][1] in {0, 25, 50, 75, 100}, "g has four images there"
        with pytest.raises(UserError, match="is for images of 8 x 8 pixels, found 16 x 16; give it images that large"):
            ask_run(run, "last", ("data.test=large",), tiny.CPU)
    with pytest.raises(UserError, match="digits"):
        ask_run(run, "last", ("data={name: digits}",), tiny.CPU)


def test_scoring_again_and_a_backbone_refuse_other_classes(tmp_path, teacher_run):
    shutil.copytree(teacher_run, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["classes"][0] = "nought"
    del summary["checksum"]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="knows other classes than digits; use the data it was trained on"):
        ask_run(str(tmp_path / "run"), "last", (), tiny.CPU)
    config = tiny.experiment("student.method={name: crt}")
    with pytest.raises(UserError, match="was trained on other data than this digits; use the same data"):
        train_student(config, None, str(tmp_path / "crt"), tiny.CPU, backbone=str(tmp_path / "run"))
    rarer = tiny.experiment("student.method={name: crt}", "data.imbalance_ratio=5")
    with pytest.raises(UserError, match="was trained on other data than this digits; use the same data"):
        train_student(rarer, None, str(tmp_path / "crt"), tiny.CPU, backbone=str(teacher_run))
    assert not (tmp_path / "crt").exists()


def test_an_average_has_one_temperature(tmp_path, ensemble, cache):
    with pytest.raises(CacheError, match="holds an average at temperature 2, from which none at 4 follows"):
        train_student(tiny.experiment("student.method.temperature=4"), str(ensemble), str(tmp_path / "four"), tiny.CPU)
    train_student(tiny.experiment("student.method.temperature=2"), str(ensemble), str(tmp_path / "two"), tiny.CPU)
    train_student(tiny.experiment("student.method.temperature=4"), str(cache), str(tmp_path / "alone"), tiny.CPU)


def test_verifying_compares_the_features_too(tmp_path, ensemble, teacher_run, monkeypatch):
    teachers = [str(teacher_run), str(ensemble.parent / "jittered")]
    report = verify_cache(str(ensemble), teachers, 2, None, (), tiny.CPU)
    assert report["passed"] and set(report["features"]) == {"teacher", "jittered"}
    assert all(0 < distance < 1e-3 for distance in report["features"].values()), "cosine distance"
    shutil.copytree(teacher_run, tmp_path / "renamed")
    with pytest.raises(UserError, match="features .* named jittered, teacher; found jittered, renamed"):
        verify_cache(str(ensemble), [str(tmp_path / "renamed"), teachers[1]], 2, None, (), tiny.CPU)
    plane = Cache.stored_feature_plane
    monkeypatch.setattr(Cache, "stored_feature_plane", lambda self, name, view: np.roll(plane(self, name, view), 1, axis=0))
    assert not verify_cache(str(ensemble), teachers, 2, None, (), tiny.CPU)["passed"]


def test_runs_are_compared_as_one_only_if_they_are_the_same_but_for_the_seed(tmp_path, teacher_run, cache):
    folders = []
    for backbone in ("kd", "bkd"):
        config = tiny.experiment(f"student.method.name={backbone}")
        train_student(config, str(cache), str(tmp_path / backbone), tiny.CPU)
        for seed in (0, 1):
            folders.append(str(tmp_path / f"crt-{backbone}-{seed}"))
            config = tiny.experiment("student.method={name: crt}", f"data.workers={seed}", seed=seed)
            train_student(config, None, folders[-1], tiny.CPU, backbone=str(tmp_path / backbone))
    warm = tiny.experiment("cache.temperature=4", tiny.EXACT, seed=1)
    dump_logits(warm, [str(teacher_run)], str(tmp_path / "warm.zarr"), tiny.CPU)
    train_student(warm, str(tmp_path / "warm.zarr"), str(tmp_path / "warm"), tiny.CPU)
    _, table = write_report([*folders, str(tmp_path / "bkd"), str(tmp_path / "warm")], str(tmp_path / "report"))
    assert [row[:2] for row in table[1:]] == [
        ["cRT student on KD", "2"],
        ["cRT student on BKD", "2"],
        ["BKD student (bkd)", "1"],
        ["BKD student (warm)", "1"],
    ]


@pytest.mark.parametrize(("batch_size", "steps"), [(64, 15), (800, 2)])  # of 464 samples, twice an epoch
def test_a_dry_run_counts_the_samples_of_both_branches(monkeypatch, capsys, batch_size, steps):
    def second_a_step(work, images, size, views=1):  # and none for a test
        return dry_run._Cost(seconds=float(size == min(batch_size, 928)), more_memory=0, basis="as told")

    monkeypatch.setattr(dry_run, "_cost_of", second_a_step)
    config = tiny.experiment(*BBN, f"student.training.batch_size={batch_size}")
    dry_run.show_training_plan(config, tiny.CPU, "student", "run")
    assert f"about {2 * steps:,} s on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("network", ["name: cifar_resnet", "name: torchvision, architecture: resnet10"])
def test_a_teacher_of_one_branch_is_told_so(network):
    with pytest.raises(UserError, match="teacher: method ce needs a network of one branch: set model.branches=1; found 2"):
        tiny.experiment(f"teacher.model={{{network}, branches: 2}}")
