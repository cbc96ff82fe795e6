"""Scores of a network's answers: accuracy over all classes, by shot group and by class; calibration; confusion.

M test images, C classes. Groups follow Liu et al. (2019): many-shot classes have more than 100 training samples, medium 20
to 100, few below 20. All scores are in percent.
"""

from dataclasses import dataclass

import numpy as np

SHOTS = ("many", "medium", "few")
BINS = 15  # of equal width, as in Guo et al. (2017)


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


def shot_groups(class_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Which classes are in each group, by training samples `class_counts` [C]: bool [C] each."""
    counts = np.asarray(class_counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}


def scores(answers: Answers, class_counts: np.ndarray) -> dict:
    """`top1` of samples; `many` `medium` `few`, means of their classes'; `per_class` [C]; `top5` and `ece`, all and by group.

    `ece` is the expected calibration error over the images of a group's classes. A group or class without test images
    has None.
    """
    per_class = accuracy_by_class(answers.predicted == answers.label, answers.label, len(class_counts))
    return {
        "top1": 100 * float((answers.predicted == answers.label).mean()),
        **_by_group(per_class, class_counts),
        "per_class": [None if np.isnan(value) else float(value) for value in per_class],
        "top5": top5(answers, class_counts),
        "ece": {group: calibration_error(bins) for group, bins in calibration(answers, class_counts).items()},
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
    right = answers.predicted == answers.label
    groups = {"all": np.ones(len(right), bool)}
    groups |= {group: members[answers.label] for group, members in shot_groups(class_counts).items()}
    bins = np.clip(np.ceil(answers.confidence.astype(float) * BINS).astype(int) - 1, 0, BINS - 1)  # (0, 1/15], (1/15, …
    found = {}
    for group, chosen in groups.items():
        images = np.bincount(bins[chosen], minlength=BINS)
        sums = [np.bincount(bins[chosen], values[chosen], BINS) for values in (answers.confidence, right)]
        found[group] = [
            {"images": int(count), "confidence": 100 * float(sure / count), "accuracy": 100 * float(good / count)}
            if count
            else {"images": 0, "confidence": None, "accuracy": None}
            for count, sure, good in zip(images, *sums)
        ]
    return found


def calibration_error(bins: list[dict]) -> float | None:
    """Expected calibration error (Guo et al., 2017, eq. 3), of one part of `calibration`; None where it has no images."""
    images = sum(part["images"] for part in bins)
    gaps = [part["images"] * abs(part["accuracy"] - part["confidence"]) for part in bins if part["images"]]
    return sum(gaps) / images if images else None


def confusion(answers: Answers, classes: int) -> Pairs:
    """Which classes were taken for which."""
    pairs, images = np.unique(answers.label * classes + answers.predicted, return_counts=True)
    label, predicted = np.divmod(pairs, classes)
    order = np.lexsort((pairs, -images, label == predicted))
    return Pairs(label=label[order], predicted=predicted[order], images=images[order])
