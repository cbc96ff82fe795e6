"""The losses against the papers' formulas in float64, written here a second time, and against public oracles."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import log_loss

from pipeline import config, losses
from pipeline.data.images import Batch
from pipeline.methods import method_loss

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
    np.testing.assert_allclose(losses.ldam(torch.tensor(cosine), torch.tensor(label), margins, 30), expected, rtol=1e-10)


def loss_of(name, **settings):
    section = config.Student(model={"name": "cifar_resnet", "classifier": "cosine"}, method={"name": name, **settings})
    return method_loss(section.method, None, T, COUNTS, torch.device("cpu"))


def test_class_weights_have_mean_one_and_wait_for_their_epoch(batch):
    student, _, label = batch
    logits, batch = torch.tensor(student), Batch(rows=None, views=None, label=torch.tensor(label), images=None)
    weights = np.array([(1 - BETA) / (1 - BETA**n) for n in COUNTS])
    weights *= len(COUNTS) / weights.sum()
    ce = -log_softmax(student, axis=1)[np.arange(32), label]
    balanced = loss_of("cb", reweight_from=2)
    np.testing.assert_allclose(balanced(logits, batch, 1)["loss"], ce, rtol=1e-6)
    np.testing.assert_allclose(balanced(logits, batch, 2)["loss"], weights[label] * ce, rtol=1e-6)
    focal = (1 - np.exp(-ce)) ** 2 * ce
    np.testing.assert_allclose(loss_of("cb_focal", gamma=2)(logits, batch, 0)["loss"], weights[label] * focal, rtol=1e-6)
    margins = losses.ldam_margins(torch.tensor(COUNTS), 0.5).float()
    unweighted = losses.ldam(logits, batch.label, margins, 30.0)
    np.testing.assert_allclose(loss_of("ldam")(logits, batch, 159)["loss"], unweighted, rtol=1e-6)
    np.testing.assert_allclose(loss_of("ldam")(logits, batch, 160)["loss"], weights[label] * unweighted.numpy(), rtol=1e-6)


def test_ldam_is_refused_with_a_linear_classifier():
    with pytest.raises(ValueError, match="ldam needs normalised features and weights"):
        config.Student(model={"name": "cifar_resnet"}, method={"name": "ldam"})
