"""The losses against the papers' formulas in float64, written here a second time, and against public oracles."""

import copy
import functools
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine as cosine_distance
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import log_loss
from sklearn.metrics.pairwise import cosine_similarity
from torch.nn import functional

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.models import build_model, classifier
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.training.methods.distillation import WithFeatures

T, BETA = 2.0, 0.9999
COUNTS = np.array([500, 200, 80, 30, 12, 5])


@pytest.fixture
def batch():
    generator = np.random.default_rng(0)
    return generator.normal(0, 4, (32, 6)), generator.normal(0, 4, (32, 6)), generator.integers(0, 6, 32)


def test_cross_entropy_is_the_negative_log_probability_of_the_label(batch):
    student, _, label = batch
    ours = losses.cross_entropy(torch.tensor(student), torch.tensor(label))
    np.testing.assert_allclose(ours, -log_softmax(student, axis=1)[np.arange(32), label], rtol=1e-12)
    np.testing.assert_allclose(ours.mean(), log_loss(label, softmax(student, axis=1), labels=range(6)), rtol=1e-12)


def test_weights_are_the_inverse_effective_numbers():
    expected = [(1 - BETA) / (1 - BETA**n) for n in COUNTS]
    np.testing.assert_allclose(losses.effective_number_weights(torch.tensor(COUNTS), BETA), expected, rtol=1e-12)
    # beta 0 weighs classes alike; beta near 1 weighs by 1 / n
    np.testing.assert_allclose(losses.effective_number_weights(torch.tensor(COUNTS), 0.0), 1, rtol=1e-12)
    near_one = losses.effective_number_weights(torch.tensor(COUNTS), 1 - 1e-9)
    np.testing.assert_allclose(near_one.numpy() * COUNTS, 1, rtol=1e-5)


def test_distillation_is_the_tempered_divergence_times_t_squared(batch):
    student, teacher, _ = batch
    p, log_q = softmax(teacher / T, axis=1), log_softmax(student / T, axis=1)
    expected = [T**2 * entropy(p[i], np.exp(log_q[i])) for i in range(32)]
    ours = losses.distillation(torch.tensor(student), torch.tensor(p), T)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)
    at_the_teacher = losses.distillation(torch.tensor(teacher), torch.tensor(p), T)
    np.testing.assert_allclose(at_the_teacher, 0, atol=1e-12)


def test_a_probability_of_zero_adds_nothing_to_the_divergence():
    value = losses.distillation(torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 0.0]]), T)
    assert value.item() == pytest.approx(-(T**2) * log_softmax([1.5, -0.5])[0], rel=1e-6)


def test_balanced_probability_is_the_softmax_of_shifted_teacher_logits(batch):
    _, teacher, _ = batch
    weights = np.array([(1 - BETA) / (1 - BETA**n) for n in COUNTS])
    identity = softmax((teacher + T * np.log(weights)) / T, axis=1)
    ours = losses.balanced_probability(torch.tensor(softmax(teacher / T, axis=1)), torch.tensor(weights))
    np.testing.assert_allclose(ours, identity, rtol=1e-12)
    np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-12)
    # the weights' scale does not matter
    scaled = losses.balanced_probability(torch.tensor(softmax(teacher / T, axis=1)), torch.tensor(1e4 * weights))
    np.testing.assert_allclose(scaled, ours, rtol=1e-12)


def test_float32_losses_are_within_rounding_of_float64(batch):
    student, teacher, label = batch
    p = softmax(teacher / T, axis=1)
    for function, arguments in (
        (losses.distillation, (torch.tensor(student), torch.tensor(p), T)),
        (losses.cross_entropy, (torch.tensor(student), torch.tensor(label))),
    ):
        exact = function(*arguments)
        rounded = function(*(a.float() if torch.is_tensor(a) and a.is_floating_point() else a for a in arguments))
        np.testing.assert_allclose(rounded, exact, rtol=2e-5, atol=2e-5)


def test_gradients_match_finite_differences(batch):
    student, teacher, label = (torch.tensor(values[:4]) for values in batch)
    p = torch.softmax(teacher / T, 1)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: losses.distillation(z, p, T), student)
    assert torch.autograd.gradcheck(lambda z: losses.cross_entropy(z, label), student)


def test_focal_loss_is_torchvisions_and_cross_entropy_at_gamma_zero(batch):
    from torchvision.ops import sigmoid_focal_loss

    student, _, label = batch
    p = softmax(student, axis=1)[np.arange(32), label]
    for gamma in (0.5, 1, 2):
        ours = losses.focal(torch.tensor(student), torch.tensor(label), gamma)
        np.testing.assert_allclose(ours, -((1 - p) ** gamma) * np.log(p), rtol=1e-9)
    np.testing.assert_allclose(losses.focal(torch.tensor(student), torch.tensor(label), 0), -np.log(p), rtol=1e-12)
    # of two classes it is torchvision's sigmoid focal loss on the difference of the logits
    two = torch.tensor(student[:, :2])
    right = torch.tensor(label % 2)
    theirs = sigmoid_focal_loss(two[:, 1] - two[:, 0], right.double(), alpha=-1, gamma=2.0)
    np.testing.assert_allclose(losses.focal(two, right, 2.0), theirs, rtol=1e-9)


def test_focal_loss_has_a_gradient_where_the_label_is_certain():
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    losses.focal(logits, torch.tensor([0, 0]), 0.5).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[1].tolist() == [-1.0, 1.0]


def test_logit_adjustment_shifts_logits_by_the_log_prior(batch):
    student, _, label = batch
    prior = COUNTS / COUNTS.sum()
    ours = losses.logit_adjusted(torch.tensor(student), torch.tensor(label), torch.tensor(prior).log(), 1.0)
    weighted = np.exp(student) * prior
    np.testing.assert_allclose(ours, -np.log(weighted[np.arange(32), label] / weighted.sum(1)), rtol=1e-10)


def test_ldam_takes_a_margin_from_the_labels_cosine(batch):
    student, _, label = batch
    cosine = np.tanh(student)
    margins = losses.ldam_margins(torch.tensor(COUNTS), 0.5)
    np.testing.assert_allclose(margins, 0.5 * (COUNTS[-1] / COUNTS) ** 0.25, rtol=1e-12)
    shifted = cosine.copy()
    shifted[np.arange(32), label] -= margins.numpy()[label]
    expected = -log_softmax(30 * shifted, axis=1)[np.arange(32), label]
    ours = losses.ldam(torch.tensor(30 * cosine), torch.tensor(label), 30 * margins)
    np.testing.assert_allclose(ours, expected, rtol=1e-10)


def method_of(name, targets=None, model=(), **settings):
    if "name" not in model:
        model = {"name": "cifar_resnet", "depth": 8, "width": 4, **dict(model)}
    section = schema.Student(model=model, method={"name": name, **settings})
    label = np.repeat(np.arange(6), COUNTS)
    setting = Context(
        model=build_model(section.model, 6, schema.Data(), 0),
        sample_id=np.arange(len(label)),
        label=label,
        class_counts=COUNTS,
        targets=targets,
        epochs=200,
        seed=0,
        device=torch.device("cpu"),
    )
    return build_method(section.method, setting)


def test_features_are_of_the_latest_batch_alone_also_in_a_copy():
    """An average of the weights is such a copy, and is only evaluated."""
    model = build_model(schema.CifarResNet(name="cifar_resnet", depth=8, width=4), 6, schema.Data(), 0)
    whole = WithFeatures(model, classifier(model))
    average, seen = copy.deepcopy(model), []
    classifier(average).register_forward_pre_hook(lambda _, inputs: seen.append(weakref.ref(inputs[0])))
    for one in (whole, average, average):
        one(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert seen[0]() is None


def loss_of(name, **settings):
    return method_of(name, model={"cosine_scale": 30}, **settings).loss


def test_class_weights_wait_for_their_epoch_and_weigh_the_mean_as_pytorch_does(batch):
    student, _, label = batch
    logits, batch = torch.tensor(student), Batch(rows=None, views=None, label=torch.tensor(label), images=None)
    weights = torch.tensor([(1 - BETA) / (1 - BETA**n) for n in COUNTS])
    plain, weighted = torch.nn.CrossEntropyLoss(), torch.nn.CrossEntropyLoss(weight=weights)
    balanced = loss_of("cb", reweight_from=0.01)
    assert balanced(logits, batch, 1).mean().item() == pytest.approx(plain(logits, batch.label).item(), rel=1e-6)
    assert balanced(logits, batch, 2).mean().item() == pytest.approx(weighted(logits, batch.label).item(), rel=1e-6)
    shifted = logits.clone()
    shifted[torch.arange(32), batch.label] -= 30 * losses.ldam_margins(torch.tensor(COUNTS), 0.5)[batch.label]
    ldam = loss_of("ldam")
    assert ldam(logits, batch, 159).mean().item() == pytest.approx(plain(shifted, batch.label).item(), rel=1e-6)
    assert ldam(logits, batch, 160).mean().item() == pytest.approx(weighted(shifted, batch.label).item(), rel=1e-6)
    assert abs(weighted(shifted, batch.label) - plain(shifted, batch.label)) > 0.1, "the weights matter here"


def test_class_balanced_focal_loss_is_weighted_by_class_and_its_mean_is_the_plain_one(batch):
    student, _, label = batch
    logits, batch = torch.tensor(student), Batch(rows=None, views=None, label=torch.tensor(label), images=None)
    weights = np.array([(1 - BETA) / (1 - BETA**n) for n in COUNTS])
    weights *= len(COUNTS) / weights.sum()
    ce = -log_softmax(student, axis=1)[np.arange(32), label]
    expected = weights[label] * (1 - np.exp(-ce)) ** 2 * ce
    found = loss_of("cb_focal", gamma=2)(logits, batch, 0)
    np.testing.assert_allclose(found.loss, expected, rtol=1e-6)
    assert found.mean().item() == pytest.approx(expected.mean(), rel=1e-6)
    later = loss_of("cb_focal", gamma=2, reweight_from=0.01)  # of 200 epochs
    np.testing.assert_allclose(later(logits, batch, 1).loss, expected / weights[label], rtol=1e-6)
    np.testing.assert_allclose(later(logits, batch, 2).loss, expected, rtol=1e-6)


def test_label_smoothing_is_pytorchs(batch):
    student, _, label = batch
    logits, batch = torch.tensor(student), Batch(rows=None, views=None, label=torch.tensor(label), images=None)
    oracle = torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, batch.label)
    assert loss_of("ce", label_smoothing=0.1)(logits, batch, 0).mean().item() == pytest.approx(oracle.item(), rel=1e-9)


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        ("ldam", {}, "ldam needs a cosine classifier: set model.cosine_scale, usually 30"),
        ("cbd", {}, "cbd needs a cosine classifier: set model.cosine_scale, usually 20"),
        ("bbn", {}, "bbn needs a network of two branches: set model.branches=2; found 1"),
        ("ce", {"branches": 2}, "ce needs a network of one branch: set model.branches=1; found 2"),
    ],
)
def test_a_method_is_refused_with_a_network_that_does_not_fit_it(method, model, message):
    with pytest.raises(ValueError, match=message):
        schema.Student(model={"name": "cifar_resnet", **model}, method={"name": method})


def test_a_batch_of_two_branches_is_even():
    with pytest.raises(ValueError, match="batch_size 127 is odd"):
        schema.Student(model={"name": "cifar_resnet", "branches": 2}, method={"name": "bbn"}, training={"batch_size": 127})


def test_another_temperature_follows_from_the_probabilities(batch):
    _, teacher, _ = batch
    warm = torch.tensor(softmax(teacher / 2, axis=1))
    for other in (1.0, 2.0, 4.0):
        found = losses.retempered(warm, 2 / other)
        np.testing.assert_allclose(found, softmax(teacher / other, axis=1), rtol=1e-10, atol=1e-14)
    assert losses.retempered(torch.tensor([[0.0, 1.0, 2.0**-140]]), 0.25).argsort().tolist() == [[0, 2, 1]], "in their order"
    assert losses.retempered(torch.tensor([[1.0, 0.0]]), 0.5).tolist() == [[1, 0]]


def cached(values, widths=()):
    """What a method asks of a cache's targets."""

    def probability(rows, views, temperature=T):
        return torch.tensor(values) if temperature == T else losses.retempered(torch.tensor(values), T / temperature)

    return SimpleNamespace(
        probability=probability, features=lambda rows, views: torch.tensor(values), temperature=T, widths=widths
    )


def test_students_of_another_temperature_minimise_its_divergence(batch):
    student, teacher, label = batch
    targets = cached(softmax(teacher / T, axis=1))
    loss = method_of("kd", targets, temperature=3.0).loss
    p, log_q = softmax(teacher / 3, axis=1), log_softmax(student / 3, axis=1)
    expected = 9 * (p * (np.log(p) - log_q)).sum(1)
    found = loss(torch.tensor(student), Batch(rows=None, views=None, label=torch.tensor(label), images=None), 0)
    np.testing.assert_allclose(found.parts["kd"], expected, rtol=1e-10, atol=1e-14)


def test_bkd_weighs_its_parts_by_alpha_and_classes_from_its_epoch_on(batch):
    student, teacher, label = batch
    p, log_q = softmax(teacher / T, axis=1), log_softmax(student / T, axis=1)
    weighted = p * np.array([(1 - BETA) / (1 - BETA**n) for n in COUNTS])
    q, ce = weighted / weighted.sum(1, keepdims=True), -log_softmax(student, axis=1)[np.arange(32), label]
    loss = method_of("bkd", cached(p), alpha=3.0, reweight_from=0.8).loss  # of 200 epochs
    given = Batch(rows=None, views=None, label=torch.tensor(label), images=None)
    for epoch, target in (159, p), (160, q):
        expected = ce + 3 * T**2 * (target * (np.log(target) - log_q)).sum(1)
        np.testing.assert_allclose(loss(torch.tensor(student), given, epoch).loss, expected, rtol=1e-6)  # weights are float32


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("focal", {"gamma": 2.0}, lambda z, y: -((1 - softmax(z, axis=1)[y]) ** 2) * log_softmax(z, axis=1)[y]),
        ("logit_adjustment", {"tau": 2.0}, lambda z, y: -log_softmax(z + 2 * np.log(COUNTS / COUNTS.sum()), axis=1)[y]),
    ],
)
def test_a_method_minimises_its_own_loss(batch, name, settings, expected):
    student, _, label = batch
    given = Batch(rows=None, views=None, label=torch.tensor(label), images=None)
    found = method_of(name, **settings).loss(torch.tensor(student), given, 0).loss
    np.testing.assert_allclose(found, expected(student, (np.arange(32), label)), rtol=1e-6)


def test_crt_draws_classes_alike():
    drawn = np.bincount(np.repeat(np.arange(6), COUNTS)[method_of("crt").rows(0)], minlength=6)
    assert drawn.sum() == COUNTS.sum() and drawn.min() > 0.6 * COUNTS.sum() / 6


def test_class_balanced_distillation_is_cross_entropy_and_the_cosine_distance(batch):
    student, _, label = batch
    generator = np.random.default_rng(1)
    features, theirs = generator.normal(size=(2, 32, 16))
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    loss = method_of("cbd", cached(theirs, [16]), {"cosine_scale": 20}).loss
    cosine = np.array([1 - cosine_distance(f, t) for f, t in zip(features, theirs)])
    ce = -log_softmax(student, axis=1)[np.arange(32), label]
    output = torch.tensor(student), torch.tensor(features)
    found = loss(output, Batch(rows=None, views=None, label=torch.tensor(label), images=None), 0)
    np.testing.assert_allclose(found.loss, 0.6 * ce + 0.4 * 100 * (1 - cosine), rtol=1e-10)
    assert found.correct.tolist() == (student.argmax(1) == label).tolist()


def test_features_of_another_width_than_the_students_are_refused():
    with pytest.raises(UserError, match="are 16 wide, .* together 24; set student.model.projection=24"):
        method_of("cbd", cached(np.ones((1, 24)), [16, 8]), {"cosine_scale": 20})
    method = method_of("cbd", cached(np.ones((1, 24)), [16, 8]), {"cosine_scale": 20, "projection": 24})
    logits, features = method.network(torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    assert logits.shape == (5, 6) and features.shape == (5, 24) and (features >= 0).all()
    # the logits are 20 times the cosines between features and the classifier's weights
    weight = method.network.model.network.fc[2].weight
    np.testing.assert_allclose(
        logits.detach(), 20 * cosine_similarity(features.detach().numpy() + 1e-12, weight.detach().numpy()), atol=1e-4
    )


def test_two_branches_share_their_weight_as_the_epochs_go(batch):
    _, _, label = batch
    method = method_of("bbn", model={"branches": 2})
    rows = method.rows(3)
    assert sorted(rows[0::2]) == list(range(COUNTS.sum())), "every other is of the uniform branch"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (32, 3, 8, 8), generator=generator).byte()
    network = method.network.model.network.eval()
    shared = network.shared(method.network.model.normalise(images))
    common, rare = (branch(shared).mean((2, 3)).detach().double().numpy() for branch in network.branches)
    weight, bias = network.fc.weight.detach().double().numpy(), network.fc.bias.detach().double().numpy()
    output = method.network.eval()(images)
    for epoch, share in (0, 1.0), (100, 0.75), (199, 1 - (199 / 200) ** 2):
        mixed = np.concatenate([share * common[0::2], (1 - share) * rare[1::2]], axis=1)
        log_p = log_softmax(2 * mixed @ weight.T + bias, axis=1)
        pairs = np.arange(16)
        expected = -share * log_p[pairs, label[0::2]] - (1 - share) * log_p[pairs, label[1::2]]
        found = method.loss(output, Batch(rows=None, views=None, label=torch.tensor(label), images=None), epoch)
        np.testing.assert_allclose(found.loss.detach()[0::2], expected, rtol=1e-4)
        np.testing.assert_allclose(found.loss.detach()[1::2], expected, rtol=1e-4)
    # one image's answer is that of both branches in equal shares
    whole = np.concatenate([common, rare], axis=1) @ weight.T + bias
    np.testing.assert_allclose(method.network.model(images).detach(), whole, rtol=1e-3, atol=1e-4)


def test_two_branches_of_torchvisions_resnet_are_its_last_block_twice(batch):
    method = method_of("bbn", model={"name": "torchvision", "architecture": "resnet18", "branches": 2})
    model, generator = method.network.model, torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for value in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                value.uniform_(0.5, 1.5, generator=generator)
    parts = copy.deepcopy(model).double()
    shared, branches, fc = parts.network.shared, parts.network.branches, parts.network.fc
    assert [len(blocks) for blocks in (shared.layer4, branches)] == [1, 2], "of layer4's two blocks one is shared"
    images = torch.randint(0, 256, (16, 3, 64, 64), generator=generator).byte()  # 2 x 2 positions to pool
    label, pairs = batch[2][:16], np.arange(8)

    def residual(x, block):
        y = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        return (y + (block.downsample(x) if block.downsample else x)).relu()

    def trunk():
        x = shared.bn1(shared.conv1((images - parts.mean) / parts.std)).relu()
        blocks = [*shared.layer1, *shared.layer2, *shared.layer3, *shared.layer4]
        return functools.reduce(residual, blocks, functional.max_pool2d(x, 3, 2, 1))

    def logits(maps, share):
        common, rare = (found.mean((2, 3)) for found in maps)
        return fc(2 * torch.cat([share * common, (1 - share) * rare], dim=1)).detach().numpy()

    x = trunk()
    maps = residual(x[0::2], branches[0]), residual(x[1::2], branches[1])
    passes = []
    model.network.shared.register_forward_hook(lambda *_: passes.append(1))
    output = method.network.train()(images)
    assert len(passes) == 1
    for epoch, share in (0, 1.0), (100, 0.75), (199, 1 - (199 / 200) ** 2):
        log_p = log_softmax(logits(maps, share), axis=1)
        expected = -share * log_p[pairs, label[0::2]] - (1 - share) * log_p[pairs, label[1::2]]
        found = method.loss(output, Batch(rows=None, views=None, label=torch.tensor(label), images=None), epoch)
        np.testing.assert_allclose(found.loss.detach(), expected.repeat(2), rtol=1e-4)
    parts.eval()
    x = trunk()
    whole = logits([residual(x, branch) for branch in branches], 0.5)  # the branches' answers in equal shares
    np.testing.assert_allclose(model.eval()(images).detach(), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [{}, {"name": "torchvision", "architecture": "resnet10"}])
def test_two_branches_may_share_a_projection(batch, network):
    method = method_of("bbn", model={**network, "branches": 2, "projection": 24})
    images = torch.randint(0, 256, (32, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    output = common, _ = method.network.eval()(images)
    first, _, last = copy.deepcopy(method.network.model.network.fc).double()
    mixed = torch.cat([2 * common, 0 * common], dim=1).double()
    log_p = log_softmax(last(first(mixed).relu()).detach(), axis=1)
    found = method.loss(output, Batch(rows=None, views=None, label=torch.tensor(batch[2]), images=None), 0)
    np.testing.assert_allclose(found.loss.detach()[0::2], -log_p[np.arange(16), batch[2][0::2]], rtol=1e-4)


def test_a_frozen_backbone_neither_learns_nor_counts_batches():
    method = method_of("crt")
    before = {name: value.clone() for name, value in method.network.model.state_dict().items()}
    method.network.train()
    method.network(torch.zeros(4, 3, 8, 8, dtype=torch.uint8)).sum().backward()
    learning = [name for name, value in method.network.model.named_parameters() if value.grad is not None]
    assert learning == ["network.fc.weight", "network.fc.bias"]
    assert all(torch.equal(value, before[name]) for name, value in method.network.model.state_dict().items())


def test_a_frozen_backbone_may_normalise_by_the_batch():
    method = method_of("crt", batch_statistics=True)
    images = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    before = method.network.model.network.bn1.running_mean.clone()
    trained, evaluated = method.network.train()(images), method.network.eval()(images)
    assert not torch.allclose(trained, evaluated) and not torch.equal(method.network.model.network.bn1.running_mean, before)
    trained.sum().backward()
    learning = [name for name, value in method.network.model.named_parameters() if value.grad is not None]
    assert learning == ["network.fc.weight", "network.fc.bias"]
