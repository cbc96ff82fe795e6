"""Scores from logits: accuracy over all classes, by shot group and by class.

Groups follow Liu et al. (2019): many-shot classes have more than 100 training samples, medium 20 to 100, few below 20.
"""

import numpy as np

SHOTS = ("many", "medium", "few")


def shot_groups(class_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Which classes are in each group, by training samples `class_counts` [C]: bool [C] each."""
    counts = np.asarray(class_counts)
    return {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}


def scores(predicted: np.ndarray, label: np.ndarray, class_counts: np.ndarray) -> dict:
    """Accuracies in percent: `top1` over samples, `many` `medium` `few` as means of their classes', `per_class` [C].

    A group or class without test samples has None.
    """
    classes = len(class_counts)
    correct = np.bincount(label[predicted == label], minlength=classes)
    total = np.bincount(label, minlength=classes)
    with np.errstate(invalid="ignore"):
        per_class = 100 * correct / total
    result = {"top1": float(100 * correct.sum() / total.sum())}
    for group, members in shot_groups(class_counts).items():
        present = members & (total > 0)
        result[group] = float(per_class[present].mean()) if present.any() else None
    result["per_class"] = [None if np.isnan(value) else float(value) for value in per_class]
    return result
