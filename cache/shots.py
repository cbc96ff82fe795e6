"""Shot groups of classes (Liu et al., 2019): many-shot ones have more than 100 training samples, few-shot fewer than 20."""

import numpy as np

SHOTS = "many", "medium", "few"


def shot(class_counts) -> np.ndarray:
    """The shot group of classes with `class_counts` training samples [C]: positions in SHOTS, int64 [C]."""
    counts = np.asarray(class_counts)
    return np.where(counts > 100, 0, np.where(counts < 20, 2, 1))


def shot_groups(class_counts) -> dict[str, np.ndarray]:
    """Which classes are in each group, by training samples `class_counts` [C]: bool [C] each."""
    place = shot(class_counts)
    return {name: place == i for i, name in enumerate(SHOTS)}


def of_groups(label: np.ndarray, class_counts) -> dict[str, np.ndarray]:
    """Which of samples of the classes `label` [M] are in each group, and in "all": bool [M] each."""
    groups = {name: members[label] for name, members in shot_groups(class_counts).items()}
    return {"all": np.ones(len(label), bool)} | groups
