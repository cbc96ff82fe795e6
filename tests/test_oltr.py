"""OLTR's attention, memory and loss against formulas written here a second time, and the method from end to end."""

import numpy as np
import pytest
import tiny
import torch
from scipy.special import log_softmax, softmax

from offline_bkd.pipeline import UserError, runs, schema
from offline_bkd.pipeline.backbone import take_backbone
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import Batch, open_images
from offline_bkd.pipeline.dry_run import show_dump_plan
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.evaluate import ask_run, load_model
from offline_bkd.pipeline.models import build_model, classifier, memory, new_parts
from offline_bkd.pipeline.models.classifiers import SquashedCosineClassifier
from offline_bkd.pipeline.models.oltr import Memory, ModulatedAttention
from offline_bkd.pipeline.train import train_student, train_teacher
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.training.optimisation import build_optimiser

OLTR = "student.method={name: oltr}", "student.model.memory=true"
DATA = schema.Digits(name="digits")


def drawn(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module in float64, with normal weights instead of its first ones."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.double().parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / parameter.shape[-1] ** 0.5
    return module


def arrays(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def test_attention_is_the_papers():
    module = drawn(ModulatedAttention(6, 2, 3))
    x = np.random.default_rng(0).normal(size=(4, 6, 2, 3))
    w, places, expected = arrays(module), [(i, j) for i in range(2) for j in range(3)], np.empty_like(x)
    for image, found in zip(x, expected):
        columns = [image[:, i, j] for i, j in places]  # six positions of six channels

        def embed(name, columns=columns):
            return [w[f"{name}.weight"][:, :, 0, 0] @ column + w[f"{name}.bias"] for column in columns]

        query, key, value = embed("query"), embed("key"), embed("value")
        where = softmax(w["spatial.weight"] @ image.reshape(-1) + w["spatial.bias"])
        for place, (i, j) in enumerate(places):
            share = softmax([query[place] @ other for other in key])
            mask = w["mask.weight"][:, :, 0, 0] @ sum(part * one for part, one in zip(share, value))
            found[:, i, j] = image[:, i, j] + where[place] * mask
    np.testing.assert_allclose(module(torch.tensor(x)).detach(), expected, rtol=1e-10)
    channels_last = torch.tensor(x).contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(module(channels_last).detach(), expected, rtol=1e-10)


def test_attention_begins_by_changing_nothing_and_can_learn():
    module = ModulatedAttention(6, 2, 3)
    x = torch.randn(4, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(x), x)
    assert all((layer.bias == 0).all() for layer in (module.query, module.key, module.value))
    module(x).square().sum().backward()
    assert module.mask.weight.grad.abs().sum() > 0


def test_the_memorys_logits_are_the_papers():
    module = drawn(Memory(5, 7))
    v, w = np.random.default_rng(1).normal(size=(8, 5)), arrays(module)
    expected = np.empty((8, 7))
    for features, logits in zip(v, expected):
        recalled = softmax(w["hallucinator.weight"] @ features + w["hallucinator.bias"]) @ w["centroids"]
        selector = np.tanh(w["selector.weight"] @ features + w["selector.bias"])
        reach = 10 / min(np.linalg.norm(features - centroid) for centroid in w["centroids"])
        x = reach * (features + selector * recalled)
        norm = np.linalg.norm(x)
        for c, weight in enumerate(w["classifier.weight"]):
            logits[c] = 16 * norm / (1 + norm) * (x / norm) @ (weight / np.linalg.norm(weight))
    np.testing.assert_allclose(module(torch.tensor(v)).detach(), expected, rtol=1e-10)


def test_centroids_do_not_learn_from_the_logits_and_a_feature_may_be_one():
    module = Memory(5, 7)
    module.centroids.data.normal_(generator=torch.Generator().manual_seed(0))
    features = module.centroids.detach().clone().requires_grad_()
    logits = module(features)
    logits.square().sum().backward()
    assert module.centroids.grad is None and logits.isfinite().all() and features.grad.isfinite().all()
    assert module.selector.weight.grad.abs().sum() > 0 and module.hallucinator.weight.grad.abs().sum() > 0


def test_the_squashed_classifier_begins_uniform():
    weight = SquashedCosineClassifier(64, 500).weight
    assert weight.abs().max() <= 1 / 8 and weight.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)


@pytest.mark.parametrize("scale", [0.3, 3.0])  # others within the margin of ten, and beyond
def test_the_memorys_loss_is_the_papers_and_its_gradient_that_of_finite_differences(scale):
    generator = np.random.default_rng(2)
    v, centroids, label = scale * generator.normal(size=(8, 5)), scale * generator.normal(size=(7, 5)), np.arange(8) % 7
    attract = sum(((v[i] - centroids[label[i]]) ** 2).sum() for i in range(8)) / (2 * 8)
    others = sum(((v[i] - centroids[c]) ** 2).sum() for i in range(8) for c in range(7) if c != label[i]) / (8 * 7)
    assert (others < 10) == (scale == 0.3)
    inputs = [torch.tensor(values, requires_grad=True) for values in (v, centroids)]
    found = losses.memory(inputs[0], torch.tensor(label), inputs[1])
    assert found.shape == (8,) and found.mean().item() == pytest.approx(attract + 0.01 * max(0, 10 - others), rel=1e-12)
    # centroids are kept from others' features, but drawn to their own by centroid_pull alone
    assert torch.autograd.gradcheck(lambda v: losses.memory(v, torch.tensor(label), inputs[1].detach()), inputs[0])
    found.mean().backward()
    away = torch.tensor(centroids, requires_grad=True)
    apart = sum((torch.tensor(v[i]) - away[c]).square().sum() for i in range(8) for c in range(7) if c != label[i]) / (8 * 7)
    (0.01 * (10 - apart).clamp_min(0)).backward()
    np.testing.assert_allclose(inputs[1].grad, away.grad, rtol=1e-9, atol=1e-15)


def test_centroids_are_drawn_to_the_features_of_their_class_as_the_public_code_does():
    generator = np.random.default_rng(2)
    v, label = generator.normal(size=(8, 5)), np.array([0, 0, 0, 1, 1, 2, 3, 3])
    centroids = torch.tensor(generator.normal(size=(5, 5)), requires_grad=True)
    pull = losses.centroid_pull(torch.tensor(v, requires_grad=True), torch.tensor(label), centroids)
    assert pull.tolist() == [0] * 8
    pull.mean().backward()
    expected = np.zeros((5, 5))
    for c in range(4):
        own = v[label == c]
        expected[c] = (centroids[c].detach().numpy() - own).sum(0) / ((1 + len(own)) * 8)
    np.testing.assert_allclose(centroids.grad, expected, rtol=1e-12)


def network(section=None, size=(8, 8), **values):
    section = section or schema.CifarResNet(name="cifar_resnet", depth=8, width=4, memory=True, **values)
    return build_model(section, 10, DATA, 0, size)


def test_a_network_with_a_memory_is_the_plain_one_with_parts_added():
    plain = build_model(schema.CifarResNet(name="cifar_resnet", depth=8, width=4), 10, DATA, 0)
    found, new = network(size=(8, 12)), tuple(new_parts(network()))
    assert {name for name in found.state_dict() if not name.startswith(new)} == {
        name for name in plain.state_dict() if not name.startswith("network.fc.")
    }
    assert isinstance(classifier(found), SquashedCosineClassifier) and classifier(found).in_features == 16
    assert memory(found).centroids.shape == (10, 16) and found.network.blocks[-1].spatial.weight.shape == (6, 96)
    images = torch.randint(0, 256, (3, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert found(images).shape == (3, 10)
    wider = network(projection=24)
    assert memory(wider).centroids.shape == (10, 24) and wider(images[..., :8]).shape == (3, 10)
    again = network()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in network().state_dict().items())


@pytest.mark.parametrize("projection", [None, 24])
def test_attention_and_projection_learn_as_the_backbone_and_centroids_at_a_rate_of_their_own(projection):
    model, training = network(projection=projection), schema.Training(backbone_rate=0.1, centroid_rate=0.5)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimiser(model, training).param_groups
    found = {names[parameter]: group["share"] for group in groups for parameter in group["params"]}
    expected = dict.fromkeys(names.values(), 0.1)
    for name in expected:
        if name.endswith("centroids"):
            expected[name] = 0.5
        elif "hallucinator" in name or "selector" in name or "classifier" in name:
            expected[name] = 1.0
    assert found == expected and sorted(set(found.values())) == [0.1, 0.5, 1.0]
    alone = build_optimiser(model, schema.Training(centroid_rate=0.1)).param_groups
    assert sorted((group["share"], len(group["params"])) for group in alone) == [(0.1, 1), (1.0, len(names) - 1)]


@pytest.mark.parametrize("side", [64, 70])
def test_torchvisions_resnets_may_have_a_memory_and_others_may_not(side):
    def section(name):
        return schema.TorchvisionModel(name="torchvision", architecture=name, memory=True)

    found = network(section("resnet10"), (side, side)).eval()
    assert found.network.layer4[-1].spatial.out_features == (4 if side == 64 else 9)
    assert found(torch.zeros(2, 3, side, side, dtype=torch.uint8)).shape == (2, 10)
    with pytest.raises(UserError, match="the last stage of a ResNet, which mobilenet_v2 is not; choose a resnet"):
        network(section("mobilenet_v2"), (side, side))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.method={name: oltr}", "student: method oltr needs a network with a memory: set model.memory=true"),
        ("student.model.memory=true", "student: method bkd needs a network without a memory: set model.memory=false"),
        ("teacher.model.memory=true", "teacher: method ce needs a network without a memory: set model.memory=false"),
    ],
)
def test_a_memory_is_for_students_of_oltr(override, message):
    with pytest.raises(UserError, match=message):
        tiny.experiment(override)


def test_a_memory_has_its_own_classifier():
    with pytest.raises(UserError, match="has its own cosine classifier: leave out model.cosine_scale"):
        tiny.experiment(*OLTR, "student.model.cosine_scale=16")


def prepared(experiment, teacher_run):
    """The student's method, on the tiny teacher's backbone, which it learns from, and its context."""
    train, _, _ = datasets.load(experiment.data)
    model = build_model(experiment.student.model, 10, experiment.data, 0, (8, 8))
    context = Context(
        model=model,
        sample_id=train.sample_id,
        label=train.label,
        class_counts=train.class_counts,
        targets=None,
        epochs=2,
        seed=0,
        device=tiny.CPU,
        images=open_images(train, experiment.views, tiny.CPU, 0),
        backbone=take_backbone(model, experiment.student.model, runs.open_run(teacher_run), train),
    )
    return build_method(experiment.student.method, context), context


@pytest.fixture(scope="module")
def recipe(teacher_run):
    return prepared(tiny.experiment(*OLTR), teacher_run)


def test_the_memory_begins_with_what_the_backbone_knows(recipe, teacher_run):
    model, setting = recipe[0].network.model, recipe[1]
    backbone = load_model(runs.open_run(teacher_run), "last", tiny.experiment(), 10)
    rows = np.arange(len(setting.label))
    (batch,) = setting.images.batches(rows, None, len(rows))
    with torch.no_grad():
        features = backbone.network.shared(backbone.normalise(batch.images)).mean((2, 3)).numpy()
    means = [features[setting.label == c].mean(0) for c in range(10)]
    np.testing.assert_allclose(memory(model).centroids.detach(), means, rtol=1e-4, atol=1e-5)
    assert torch.equal(memory(model).hallucinator.weight, backbone.network.fc.weight)
    assert torch.equal(memory(model).hallucinator.bias, backbone.network.fc.bias)
    counts = np.bincount(setting.label[recipe[0].rows(0)], minlength=10)
    assert counts.min() > 0.6 * len(rows) / 10, "its samples are drawn class by class"


def test_its_loss_is_cross_entropy_and_a_hundredth_of_the_memorys(recipe):
    generator = np.random.default_rng(3)
    logits, features, label = generator.normal(size=(8, 10)), generator.normal(size=(8, 16)), np.arange(8)
    centroids = memory(recipe[0].network.model).centroids
    batch = Batch(rows=None, views=None, label=torch.tensor(label), images=None)
    found = recipe[0].loss((torch.tensor(logits), torch.tensor(features).float()), batch, 0)
    ce = -log_softmax(logits, axis=1)[np.arange(8), label]
    distance = losses.memory(torch.tensor(features), torch.tensor(label), centroids.double()).detach()
    np.testing.assert_allclose(found.loss.detach(), ce + 0.01 * distance.numpy(), rtol=1e-5)
    assert found.correct.tolist() == (logits.argmax(1) == label).tolist()
    found.mean().backward()
    pull = (centroids.detach()[:8].numpy() - features) / (2 * 8)  # one feature of each class, in a batch of eight
    apart = centroids.detach().double().requires_grad_()  # beside what draws them, a hundredth of what keeps them from others
    (0.01 * losses.memory(torch.tensor(features), torch.tensor(label), apart)).mean().backward()
    np.testing.assert_allclose(centroids.grad[:8], pull + apart.grad[:8].numpy(), rtol=1e-4, atol=1e-6)


def test_it_learns_from_a_backbone_and_scores_as_it_was_saved(tmp_path, teacher_run):
    experiment = tiny.experiment(*OLTR, "student.training.epochs=6")
    train_student(experiment, None, str(tmp_path / "oltr"), tiny.CPU, backbone=str(teacher_run))
    run = runs.open_run(tmp_path / "oltr")
    summary, records = run.summary(), run.metrics()
    assert summary["method"] == "oltr" and summary["image_size"] == [8, 8] and records[-1]["loss"] < records[0]["loss"]
    assert ask_run(str(run.folder), "last", (), tiny.CPU).scores == {k: v for k, v in summary["last"].items() if k != "epoch"}
    before, after = (runs.Run(folder).load_tensors("last")[0] for folder in (teacher_run, tmp_path / "oltr"))
    assert not torch.equal(before["network.conv1.weight"], after["network.conv1.weight"]), "all of the backbone learns"
    assert after["network.blocks.3.mask.weight"].abs().sum() > 0
    with pytest.raises(UserError, match="method oltr learns from a backbone; name one with --backbone"):
        train_student(experiment, None, str(tmp_path / "none"), tiny.CPU)
    for further in (
        tiny.experiment("student.method={name: crt}"),
        experiment,
    ):  # the one would lose parts, the other double them
        with pytest.raises(
            UserError, match="is of method oltr, whose network has parts that a backbone .*such as a teacher's"
        ):
            train_student(further, None, str(tmp_path / "further"), tiny.CPU, backbone=str(tmp_path / "oltr"))
    assert not (tmp_path / "further").exists()


def test_a_projection_that_the_backbone_does_not_have_is_drawn_and_the_memory_knows_its_features(teacher_run):
    """As in the public code for ImageNet-LT, whose second stage adds a layer."""
    experiment = tiny.experiment(*OLTR, "student.model.projection=12")
    recipe, context = prepared(experiment, teacher_run)
    backbone = load_model(runs.open_run(teacher_run), "last", tiny.experiment(), 10)
    rows = np.arange(len(context.label))
    (batch,) = context.images.batches(rows, None, len(rows))
    fresh = build_model(experiment.student.model, 10, experiment.data, 0, (8, 8)).network.fc[0]
    with torch.no_grad():
        features = fresh(backbone.network.shared(backbone.normalise(batch.images)).mean((2, 3))).relu().numpy()
    means = [features[context.label == c].mean(0) for c in range(10)]
    np.testing.assert_allclose(memory(context.model).centroids.detach(), means, rtol=1e-4, atol=1e-5)
    crt = tiny.experiment("student.method={name: crt}", "student.model.projection=12")
    with pytest.raises(UserError, match="is another network than the new one: projection was None and is now 12"):
        prepared(crt, teacher_run)  # where it would stay as it was drawn


def test_a_frozen_backbone_stays_and_what_is_added_learns(tmp_path):
    """As in the public code for Places-LT, whose first stage has the projection already."""
    frozen = "student.method={name: oltr, freeze_backbone: true}", "student.training.backbone_rate=0.01"
    both = "teacher.model.projection=12", "student.model.projection=12"
    experiment = tiny.experiment(*OLTR, *frozen, *both, "teacher.training.epochs=1")
    train_teacher(experiment, str(tmp_path / "teacher"), tiny.CPU)
    model, first = prepared(experiment, tmp_path / "teacher")[1].model, runs.Run(tmp_path / "teacher").load_tensors("last")[0]
    groups = build_optimiser(model, experiment.student.training).param_groups
    learning = {parameter for group in groups for parameter in group["params"]}
    added = "network.blocks.3.", "network.fc."  # attention; projection and memory
    assert all((parameter in learning) == name.startswith(added) for name, parameter in model.named_parameters())
    assert torch.equal(model.network.fc[0].weight, first["network.fc.0.weight"])
    assert torch.equal(memory(model).hallucinator.weight, first["network.fc.2.weight"])


def test_a_backbone_with_a_cosine_classifier_gives_the_memory_its_features_alone(tmp_path):
    cosine = tiny.experiment(*OLTR, "teacher.model.cosine_scale=16", "student.training.epochs=1")
    train_teacher(cosine, str(tmp_path / "teacher"), tiny.CPU)
    train_student(cosine, None, str(tmp_path / "oltr"), tiny.CPU, backbone=str(tmp_path / "teacher"))
    assert runs.open_run(tmp_path / "oltr").summary()["last"]["epoch"] == 1
    asked = tiny.experiment("cache.features=true")
    with pytest.raises(UserError, match="oltr has a memory before its classifier, .*; leave out cache.features"):
        dump_logits(asked, [str(tmp_path / "oltr")], str(tmp_path / "s"), tiny.CPU)
    with pytest.raises(UserError, match="has a memory before its classifier"):
        show_dump_plan(asked, tiny.CPU, [str(tmp_path / "oltr")], str(tmp_path / "s"))
    assert not (tmp_path / "s").exists()


def test_interrupted_and_resumed_is_uninterrupted(tmp_path, teacher_run, device):
    experiment = tiny.experiment(*OLTR, "student.training.epochs=3")
    train_student(experiment, None, str(tmp_path / "whole"), device, backbone=str(teacher_run))
    with tiny.interrupted_after(1):
        train_student(experiment, None, str(tmp_path / "cut"), device, backbone=str(teacher_run))
    train_student(experiment, None, str(tmp_path / "cut"), device, resume=True, backbone=str(teacher_run))
    whole, cut = (runs.Run(tmp_path / name).load_tensors("last")[0] for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


def test_a_bfloat16_forward_trains_too(tmp_path, teacher_run):
    experiment = tiny.experiment(*OLTR, "student.training.precision=bfloat16", "student.training.epochs=1")
    train_student(experiment, None, str(tmp_path / "oltr"), tiny.CPU, backbone=str(teacher_run))
    assert all(
        value.dtype in (torch.float32, torch.int64) for value in runs.Run(tmp_path / "oltr").load_tensors("last")[0].values()
    )
