"""Scores against torchmetrics' and scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score
from torchmetrics.functional.classification import multiclass_accuracy

from offline_bkd.pipeline import metrics

COUNTS = np.array([101, 500, 100, 20, 19, 5, 1])


@pytest.fixture
def answers():
    generator = np.random.default_rng(0)
    label = generator.integers(0, 7, 500)
    return np.where(generator.random(500) < 0.6, label, generator.integers(0, 7, 500)), label


def test_groups_are_by_training_samples_with_100_and_20_in_the_middle():
    groups = metrics.shot_groups(COUNTS)
    assert groups["many"].tolist() == [True, True] + [False] * 5
    assert groups["medium"].tolist() == [False, False, True, True] + [False] * 3
    assert groups["few"].tolist() == [False] * 4 + [True] * 3


def test_scores_are_those_of_public_libraries(answers):
    predicted, label = answers
    ours = metrics.scores(predicted, label, COUNTS)
    assert ours["top1"] == pytest.approx(100 * accuracy_score(label, predicted))
    np.testing.assert_allclose(ours["per_class"], 100 * recall_score(label, predicted, average=None))
    by_class = multiclass_accuracy(torch.tensor(predicted), torch.tensor(label), 7, average="none").numpy() * 100
    np.testing.assert_allclose(ours["per_class"], by_class, rtol=1e-6)
    for group, members in (("many", [0, 1]), ("medium", [2, 3]), ("few", [4, 5, 6])):
        assert ours[group] == pytest.approx(by_class[members].mean(), rel=1e-6)


def test_a_class_or_group_without_test_samples_has_no_score(answers):
    predicted, label = answers
    chosen = (label != 0) & (label < 4)
    ours = metrics.scores(predicted[chosen], label[chosen], COUNTS)
    assert ours["per_class"][0] is None and ours["few"] is None
    assert ours["many"] == pytest.approx(ours["per_class"][1])
