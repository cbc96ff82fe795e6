"""Experts and the student that learns from them, against the paper's formulas and from end to end."""

import csv
import re
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import chisquare

from offline_bkd.cache import CacheError, open_cache
from offline_bkd.cache.shots import shot_groups
from offline_bkd.pipeline import UserError, runs, schema
from offline_bkd.pipeline.cached_targets import CachedTargets
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.dry_run import show_dump_plan
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.evaluate import ask_run, infer
from offline_bkd.pipeline.show.evaluation import keep_evaluation
from offline_bkd.pipeline.teachers import load_teacher
from offline_bkd.pipeline.train import train_student, train_teacher
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.verify import verify_cache

LFME = "student.method={name: lfme}"
SHOTS = "many", "medium", "few"
T = 2.0
COUNTS = np.array([500, 200, 80, 30, 12, 5, 3])
GROUPS = [0, 1], [2, 3], [4, 5, 6]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """The folders of an expert of each shot group."""
    folder = tmp_path_factory.mktemp("experts")
    for shot in SHOTS:
        train_teacher(tiny.experiment(f"teacher.expert={shot}"), str(folder / shot), tiny.CPU)
    return [folder / shot for shot in SHOTS]


@pytest.fixture(scope="module")
def experts_cache(experts):
    path = experts[0].parent / "experts.zarr"
    dump_logits(
        tiny.experiment(tiny.EXACT),
        [str(one) for one in experts],
        str(path),
        tiny.CPU,
    )
    return path


@pytest.mark.parametrize("shot", ["many", "medium", "few"])
def test_an_expert_draws_its_own_classes_alone_each_as_often(shot):
    config = tiny.experiment(f"teacher.expert={shot}", "teacher.method={name: ce, sampler: class_balanced}")
    own, _, _ = datasets.load(config.data, shot)
    names = "model", "targets", "epochs", "device"
    context = Context(sample_id=own.sample_id, label=own.label, class_counts=own.class_counts, seed=0, **dict.fromkeys(names))
    rows = np.concatenate([build_method(config.teacher.method, context).rows(epoch) for epoch in range(40)])
    drawn = np.bincount(own.label[rows], minlength=10)[own.class_counts > 0]
    assert drawn.sum() == 40 * len(own) and (len(drawn) == 1 or chisquare(drawn).pvalue > 1e-3)
    assert len(np.unique(rows)) == len(own)


def test_an_expert_takes_no_label_smoothing():
    with pytest.raises(UserError, match="leave out expert or label_smoothing"):
        tiny.experiment("teacher.expert=few", "teacher.method={name: ce, label_smoothing: 0.1}")


def test_an_expert_fades_as_the_student_catches_up():
    def formula(student, expert, theta):
        return 1.0 if student < theta * expert else max(0.0, (expert - student) / (expert * (1 - theta)))

    right = torch.tensor([[100.0, 100, 100, 100, 100], [0, 29, 31, 65, 120]], dtype=torch.float64)
    for theta in (0.0, 0.3, 0.9):
        expected = [formula(student / 400, expert / 400, theta) for expert, student in zip(*right.tolist())]
        np.testing.assert_allclose(losses.expert_weight(right, theta), expected, rtol=1e-12)
    assert losses.expert_weight(torch.zeros(2, 3), 0.3).tolist() == [1, 1, 1], "before the first epoch"


@pytest.fixture
def graded():
    """A recipe that has graded epoch 3 of 10, the experts' logits, the student's, the labels."""
    generator = np.random.default_rng(0)
    experts, student = generator.normal(0, 3, (2, 32, 7))
    label = generator.integers(0, 7, 32)
    row = np.concatenate([softmax(experts[:, group] / T, axis=1) / 3 for group in GROUPS], axis=1)
    setting = Context(
        model=torch.nn.Identity(),
        sample_id=np.arange(COUNTS.sum()),
        label=np.repeat(np.arange(7), COUNTS),
        class_counts=COUNTS,
        targets=SimpleNamespace(probability=lambda rows, views: torch.tensor(row), temperature=T),
        epochs=10,
        seed=0,
        device=tiny.CPU,
    )
    recipe = build_method(schema.LFME(name="lfme"), setting)
    recipe.network.double().right[4] = torch.tensor([[90, 80, 70], [9, 48, 77]])
    return recipe, experts, student, label


def batch_of(label):
    return Batch(rows=None, views=None, label=torch.tensor(label), images=None)


def test_the_loss_is_the_papers(graded):
    recipe, experts, student, label = graded
    found = recipe.loss(torch.tensor(student), batch_of(label), 4)
    weights = 1.0, (80 - 48) / (80 * 0.7), 0.0
    kd, confidence, right = np.zeros(32), np.zeros(32), np.zeros(3)
    for number, group in enumerate(GROUPS):
        theirs, ours = log_softmax(experts[:, group] / T, axis=1), log_softmax(student[:, group] / T, axis=1)
        kd += weights[number] * (np.exp(theirs) * (theirs - ours)).sum(1)
        plain = softmax(experts[:, group], axis=1)
        for image in np.flatnonzero(np.isin(label, group)):
            confidence[image] = plain[image, group.index(label[image])]
            right[number] += group[plain[image].argmax()] == label[image]
    ce = -log_softmax(student, axis=1)[np.arange(32), label]
    trust = confidence + (1 - confidence) * 4 / 5  # all count from half of the ten epochs on
    np.testing.assert_allclose(found.loss, trust * ce + kd, rtol=1e-10)
    np.testing.assert_allclose(found.parts["ce"], trust * ce, rtol=1e-10)
    np.testing.assert_array_equal(recipe.network.right[5, 0], right)
    correct = student.argmax(1) == label
    np.testing.assert_array_equal(recipe.network.right[5, 1], [correct[np.isin(label, group)].sum() for group in GROUPS])
    assert found.correct.tolist() == correct.tolist()
    recipe.loss(torch.tensor(student), batch_of(label), 4)
    np.testing.assert_array_equal(recipe.network.right[5, 0], 2 * right, "an epoch's batches add up")
    np.testing.assert_array_equal(recipe.network.right[4], [[90, 80, 70], [9, 48, 77]], "the epoch before stays as it was")


def test_its_gradient_is_that_of_finite_differences(graded):
    recipe, _, student, label = graded
    logits = torch.tensor(student, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: recipe.loss(z, batch_of(label), 4).loss, logits)


def test_its_samples_are_drawn_class_by_class(graded):
    counts = np.bincount(np.repeat(np.arange(7), COUNTS)[graded[0].rows(0)], minlength=7)
    assert counts.min() > 0.6 * COUNTS.sum() / 7, "of the rarest class, too"


def test_an_expert_learns_and_is_judged_on_its_own_classes(experts):
    whole, test, _ = datasets.load(tiny.experiment().data)
    for shot, folder in zip(SHOTS, experts):
        members = shot_groups(whole.class_counts)[shot]
        train, _, _ = datasets.load(tiny.experiment().data, shot)
        np.testing.assert_array_equal(train.sample_id, whole.sample_id[members[whole.label]])
        summary = runs.open_run(folder).summary()
        assert (
            summary["method"] == f"{shot}-shot expert" and summary["class_counts"] == (whole.class_counts * members).tolist()
        )
        scores = summary["last"]
        assert [scores[other] is None for other in SHOTS] == [other != shot for other in SHOTS]
        assert scores["top1"] == pytest.approx(scores[shot]), "forty test images a class"
        assert [score is None for score in scores["per_class"]] == (~members).tolist()
        found = ask_run(str(folder), "last", (), tiny.CPU)
        assert found.scores == {k: v for k, v in scores.items() if k != "epoch"}
        keep_evaluation(found, None)
        classes = csv.DictReader((folder / "evaluation-last/classes.csv").read_text().splitlines())
        assert [row["shots"] for row in classes] == [shot if own else "" for own in members]
        model, identity = load_teacher(str(folder), whole)
        assert identity["expert"] == shot and model.members.tolist() == members.tolist()
        logits = model(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        assert torch.equal(logits.isfinite(), model.members.expand(2, -1)), "it answers among its own"


def test_a_row_of_the_cache_holds_every_experts_answer(experts, experts_cache):
    from offline_bkd.pipeline.data.images import open_images

    experiment, cache = tiny.experiment(), open_cache(experts_cache)
    train, _, _ = datasets.load(experiment.data)
    images = open_images(train, experiment.views, tiny.CPU, 0)
    plane = cache.plane(5)
    for shot, folder in zip(SHOTS, experts):
        members = shot_groups(train.class_counts)[shot]
        model, _ = load_teacher(str(folder), train)
        logits = infer(model, images, np.arange(len(train)), np.full(len(train), 5), 512)[:, members]
        expected = softmax(logits.double().numpy() / T, axis=1)
        np.testing.assert_allclose(plane[:, members], expected / 3, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(plane[:, members] / plane[:, members].sum(1, keepdims=True), expected, rtol=1e-5)
    identity = cache.identity.teacher
    with pytest.raises(CacheError, match="holds experts' answers, .*; dump a whole teacher's"):
        CachedTargets(cache, range(len(train)))
    assert "average_of" not in identity and [one["expert"] for one in identity["experts"]] == list(SHOTS)
    assert verify_cache(str(experts_cache), [str(one) for one in experts], 1, None, (), tiny.CPU)["passed"]


def test_verify_takes_experts_in_any_order(tmp_path, experts, experts_cache):
    def verified(order):
        return verify_cache(str(experts_cache), [str(experts[number]) for number in order], 1, None, (), tiny.CPU)

    assert verified([2, 0, 1]) == verified([0, 1, 2]) and verified([1, 2, 0])["passed"]
    train_teacher(tiny.experiment("teacher.expert=few", seed=1), str(tmp_path / "few"), tiny.CPU)
    with pytest.raises(CacheError, match="is not for this run: teacher.digest"):
        verify_cache(str(experts_cache), [str(tmp_path / "few"), *map(str, experts[:2])], 1, None, (), tiny.CPU)


def test_what_is_told_of_an_experts_cache_is_of_the_expert_of_each_samples_class(experts_cache):
    cache = open_cache(experts_cache)
    frame = cache.to_pandas(view=5, probabilities=True)
    found = frame.filter(like="p_").to_numpy()
    for shot, members in shot_groups(cache.class_counts).items():
        rows = (frame["shot"] == shot).to_numpy()
        own = found[rows][:, members] / found[rows][:, members].sum(1, keepdims=True)
        np.testing.assert_allclose(frame["confidence"][rows], own.max(1), rtol=1e-5)
        right = np.flatnonzero(members)[own.argmax(1)] == frame["label"][rows]
        assert frame["correct"][rows].tolist() == right.tolist()
        quality = cache.summary(planes=cache.views.count)["teacher"]
        every = cache.to_pandas()
        every = every[every["shot"] == shot]
        assert quality[shot]["accuracy"] == pytest.approx(every["correct"].mean())
        assert quality[shot]["confidence"] == pytest.approx(every["confidence"].mean(), rel=1e-6)


@pytest.mark.parametrize("made", [True, False])
def test_a_dry_run_of_a_dump_is_of_the_images_that_are_dumped(experts, capsys, made):
    teachers = [str(one) for one in experts] if made else ["nowhere"]
    show_dump_plan(tiny.experiment("teacher.expert=few"), tiny.CPU, teachers, "c.zarr")
    assert re.search(r"training samples \(N\)\W+464\b", capsys.readouterr().out)


def test_experts_that_do_not_have_every_class_once_are_refused(tmp_path, experts, teacher_run):
    many, medium, few = map(str, experts)

    def refused(message, *teachers, apart=False):
        with pytest.raises(UserError, match=message):
            dump_logits(tiny.experiment(), teachers, str(tmp_path / "c.zarr"), tiny.CPU, apart=apart)
        with pytest.raises(UserError, match=message):
            show_dump_plan(tiny.experiment(), tiny.CPU, teachers, str(tmp_path / "c.zarr"), apart=apart)
        assert not (tmp_path / "c.zarr").exists()

    refused("every medium-shot class of digits needs one expert .* found experts of many, few; name one of each", many, few)
    refused("every medium-shot class .* found experts of many", many)
    refused("experts and teachers of all classes cannot share a cache", many, medium, few, str(teacher_run))
    refused("leave out --apart", many, medium, few, apart=True)
    train_teacher(tiny.experiment("teacher.expert=few", seed=1), str(tmp_path / "again"), tiny.CPU)
    refused("every few-shot class .* found experts of many, medium, few, few", many, medium, few, str(tmp_path / "again"))
    rarer = tiny.experiment("teacher.expert=few", "data.max_per_class=60")
    train_teacher(rarer, str(tmp_path / "rarer"), tiny.CPU)
    refused("trained on these data", many, medium, str(tmp_path / "rarer"))
    other = tiny.experiment("teacher.expert=few", "data.seed=1")  # the same classes
    train_teacher(other, str(tmp_path / "other"), tiny.CPU)
    refused("the few-shot expert was trained on other images than digits has", many, medium, str(tmp_path / "other"))
    with pytest.raises(UserError, match="is an expert of few-shot classes; name one of all classes"):
        train_student(tiny.experiment("student.method.name=crt"), None, str(tmp_path / "s"), tiny.CPU, backbone=few)


def test_a_group_without_classes_has_no_expert(tmp_path):
    balanced = tiny.experiment("teacher.expert=few", "data.imbalance_ratio=2")
    with pytest.raises(UserError, match="digits: the training part has no few-shot classes; leave out their expert"):
        train_teacher(balanced, str(tmp_path / "few"), tiny.CPU)
    assert not (tmp_path / "few").exists()


def test_experts_teach_lfme_and_no_other_method(tmp_path, experts_cache, cache):
    for method in ("kd", "bkd"):
        with pytest.raises(CacheError, match=f"experts' answers, .*, which method {method} does not learn from; dump a whole"):
            train_student(tiny.experiment(f"student.method.name={method}"), str(experts_cache), str(tmp_path / "s"), tiny.CPU)
    with pytest.raises(CacheError, match="whole teachers' answers, which method lfme does not learn from; dump those of teac"):
        train_student(tiny.experiment(LFME), str(cache), str(tmp_path / "s"), tiny.CPU)
    with pytest.raises(UserError, match="method lfme learns from a cache; name one with --cache"):
        train_student(tiny.experiment(LFME), None, str(tmp_path / "s"), tiny.CPU)
    assert not (tmp_path / "s").exists()


def test_what_was_graded_survives_an_interruption(tmp_path, experts_cache, device):
    experiment = tiny.experiment(LFME, "student.training.epochs=4", "student.training.schedule={name: constant}")
    train_student(experiment, str(experts_cache), str(tmp_path / "whole"), device)
    with tiny.interrupted_after(2):
        train_student(experiment, str(experts_cache), str(tmp_path / "cut"), device)
    right = runs.Run(tmp_path / "cut").load_tensors("state")[0]["network.right"]
    assert right.sum((1, 2)).bool().tolist() == [False, True, True, False, False]
    assert (losses.expert_weight(right[2], 0.3) < 1).any(), "an expert has begun to fade"
    train_student(experiment, str(experts_cache), str(tmp_path / "cut"), device, resume=True)
    whole, cut = (runs.Run(tmp_path / name).load_tensors("last")[0] for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    losses_of = [[r["loss"] for r in runs.Run(tmp_path / name).metrics()] for name in ("whole", "cut")]
    assert losses_of[0] == losses_of[1]


def test_transform_coded_experts_teach_too(tmp_path, experts):
    experiment = tiny.experiment("cache.encoding={name: klt, max_error: 0.01}", LFME, "student.training.epochs=1")
    dump_logits(experiment, [str(one) for one in experts], str(tmp_path / "klt.zarr"), tiny.CPU)
    train_student(experiment, str(tmp_path / "klt.zarr"), str(tmp_path / "student"), tiny.CPU)
    summary = runs.open_run(tmp_path / "student").summary()
    assert summary["method"] == "lfme" and len(summary["teacher"]["experts"]) == 3
