"""Scores against torchmetrics' and scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from offline_bkd.cache.shots import shot_groups
from offline_bkd.pipeline import metrics
from offline_bkd.pipeline.evaluate import answers_of

COUNTS = np.array([101, 500, 100, 20, 19, 5, 1])
GROUPS = {"many": [0, 1], "medium": [2, 3], "few": [4, 5, 6]}


@pytest.fixture
def logits():
    """Of 500 images of seven classes, and their labels, which have the largest logit more often than others."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 7, (500,), generator=generator)
    return 2 * torch.randn(500, 7, generator=generator) + 1.5 * torch.eye(7)[label], label


@pytest.fixture
def answers(logits):
    return answers_of(*logits)


def test_groups_are_by_training_samples_with_100_and_20_in_the_middle():
    groups = shot_groups(COUNTS)
    assert groups["many"].tolist() == [True, True] + [False] * 5
    assert groups["medium"].tolist() == [False, False, True, True] + [False] * 3
    assert groups["few"].tolist() == [False] * 4 + [True] * 3


def test_accuracies_are_those_of_public_libraries(answers):
    ours = metrics.scores(answers, COUNTS)
    assert ours["top1"] == pytest.approx(100 * accuracy_score(answers.label, answers.predicted))
    np.testing.assert_allclose(ours["per_class"], 100 * recall_score(answers.label, answers.predicted, average=None))
    predicted, label = torch.from_numpy(answers.predicted), torch.from_numpy(answers.label)
    by_class = multiclass_accuracy(predicted, label, 7, average="none").numpy() * 100
    np.testing.assert_allclose(ours["per_class"], by_class, rtol=1e-6)
    for group, members in GROUPS.items():
        assert ours[group] == pytest.approx(by_class[members].mean(), rel=1e-6)


def test_top5_is_that_of_public_libraries(answers, logits):
    ours = metrics.scores(answers, COUNTS)["top5"]
    assert ours["all"] == pytest.approx(100 * top_k_accuracy_score(logits[1], logits[0], k=5))
    by_class = multiclass_accuracy(*logits, 7, average="none", top_k=5).numpy() * 100
    assert 50 < by_class.min() < by_class.max() < 100
    for group, members in GROUPS.items():
        assert ours[group] == pytest.approx(by_class[members].mean(), rel=1e-6)


def test_the_calibration_error_is_torchmetrics_overall_and_of_each_group_s_images(answers, logits):
    ours = metrics.scores(answers, COUNTS)["ece"]
    probability, label = logits[0].softmax(1), logits[1]
    assert ours["all"] == pytest.approx(100 * float(multiclass_calibration_error(probability, label, 7)), rel=1e-5)
    assert ours["all"] > 3
    for group, members in GROUPS.items():
        chosen = torch.isin(label, torch.tensor(members))
        theirs = multiclass_calibration_error(probability[chosen], label[chosen], 7)
        assert ours[group] == pytest.approx(100 * float(theirs), rel=1e-5)


def test_the_intervals_of_calibration_hold_their_images_mean_confidence_and_accuracy(answers):
    found = metrics.calibration(answers, COUNTS)
    few, right = np.isin(answers.label, GROUPS["few"]), answers.predicted == answers.label
    for group, chosen in {"all": np.full(500, True), "few": few}.items():
        assert len(found[group]) == 15
        for index, bin in enumerate(found[group]):
            there = chosen & (answers.confidence > index / 15) & (answers.confidence <= (index + 1) / 15)
            assert bin["images"] == there.sum()
            if there.any():
                assert bin["confidence"] == pytest.approx(100 * answers.confidence[there].mean(), rel=1e-5)
                assert bin["accuracy"] == pytest.approx(100 * right[there].mean())
    assert sum(bin["images"] for bin in found["few"]) == few.sum() > 100


def test_confusions_are_scikit_learns_matrix_with_the_most_frequent_errors_first(answers):
    pairs = metrics.confusion(answers, 7)
    ours = np.zeros((7, 7), int)
    ours[pairs.label, pairs.predicted] = pairs.images
    np.testing.assert_array_equal(ours, confusion_matrix(answers.label, answers.predicted))
    wrong = pairs.label != pairs.predicted
    assert wrong[: wrong.sum()].all() and (np.diff(pairs.images[wrong]) <= 0).all() and (pairs.images > 0).all()


def test_a_class_or_group_without_test_images_has_no_score(logits):
    chosen = (logits[1] != 0) & (logits[1] < 4)
    ours = metrics.scores(answers_of(logits[0][chosen], logits[1][chosen]), COUNTS)
    assert ours["per_class"][0] is None and ours["few"] is ours["top5"]["few"] is ours["ece"]["few"] is None
    assert ours["many"] == pytest.approx(ours["per_class"][1])


def test_where_there_are_fewer_than_five_classes_every_answer_is_among_the_five(logits):
    found = metrics.scores(answers_of(logits[0][:, :3], logits[1] % 3), COUNTS[:3])
    assert found["top5"]["all"] == 100 and len(found["per_class"]) == 3
