"""The losses against the papers' formulas in float64, written here a second time, and against public oracles."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import log_loss

from pipeline import losses

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
