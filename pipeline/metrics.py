"""Scores of a network's answers: accuracy over all classes, by shot group and by class; calibration; confusion.

M test images, C classes. All scores are in percent.
"""

from dataclasses import dataclass

import numpy as np

from offline_bkd.cache.calibration import BINS, calibration_error, confidence_bin
from offline_bkd.cache.shots import of_groups, shot_groups


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a network answered about test images."""

    label: np.ndarray  # int64 [M], the true classes
    predicted: np.ndarray  # int64 [M], the most probable classes
    confidence: np.ndarray  # float [M], their probabilities
    in_top5: np.ndarray  # bool [M], whether the label is among the five most probable classes


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """A confusion matrix [C, C] without its zeros: P pairs, the errors first, those of most images before others."""

    label: np.ndarray  # int64 [P]
    predicted: np.ndarray  # int64 [P]
    images: np.ndarray  # int64 [P], how many of `label` were taken for `predicted`


def scores(answers: Answers, class_counts: np.ndarray) -> dict:
    """`top1` of samples; `many` `medium` `few`, means of their classes'; `per_class` [C]; `top5` and `ece`, all and by group.

    `ece` is the expected calibration error over the images of a group's classes. A group or class without test images
    has None.
    """
    right = answers.predicted == answers.label
    per_class = accuracy_by_class(right, answers.label, len(class_counts))
    return {
        "top1": 100 * float(right.mean()),
        **_by_group(per_class, class_counts),
        "per_class": [None if np.isnan(value) else float(value) for value in per_class],
        "top5": top5(answers, class_counts),
        "ece": {
            group: 100 * calibration_error(answers.confidence[chosen], right[chosen]) if chosen.any() else None
            for group, chosen in of_groups(answers.label, class_counts).items()
        },
    }


def top5(answers: Answers, class_counts: np.ndarray) -> dict[str, float | None]:
    """How often the label is among the five most probable classes: of all samples, and by group as `scores` does."""
    per_class = accuracy_by_class(answers.in_top5, answers.label, len(class_counts))
    return {"all": 100 * float(answers.in_top5.mean()), **_by_group(per_class, class_counts)}


def accuracy_by_class(right: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    """How many of each class's images are `right` [M], float [C]; NaN for a class without images."""
    with np.errstate(invalid="ignore"):
        return 100 * np.bincount(label[right], minlength=classes) / np.bincount(label, minlength=classes)


def _by_group(per_class: np.ndarray, class_counts: np.ndarray) -> dict[str, float | None]:
    found = {}
    for group, members in shot_groups(class_counts).items():
        tested = per_class[members & ~np.isnan(per_class)]
        found[group] = float(tested.mean()) if len(tested) else None
    return found


def calibration(answers: Answers, class_counts: np.ndarray) -> dict[str, list[dict]]:
    """By "all" and shot group: of each of BINS intervals of confidence its images, their mean confidence and accuracy."""
    right, bins, found = answers.predicted == answers.label, confidence_bin(answers.confidence), {}
    for group, chosen in of_groups(answers.label, class_counts).items():
        images = np.bincount(bins[chosen], minlength=BINS)
        sums = [np.bincount(bins[chosen], values[chosen], BINS) for values in (answers.confidence, right)]
        found[group] = [
            {"images": int(count), "confidence": 100 * float(sure / count), "accuracy": 100 * float(good / count)}
            if count
            else {"images": 0, "confidence": None, "accuracy": None}
            for count, sure, good in zip(images, *sums)
        ]
    return found


def confusion(answers: Answers, classes: int) -> Pairs:
    """Which classes were taken for which."""
    pairs, images = np.unique(answers.label * classes + answers.predicted, return_counts=True)
    label, predicted = np.divmod(pairs, classes)
    order = np.lexsort((pairs, -images, label == predicted))
    return Pairs(label=label[order], predicted=predicted[order], images=images[order])
