"""Complete runs of any number of classes, made up: their scores are drawn, no network was trained."""

from pathlib import Path

import numpy as np
import tiny
import torch

from offline_bkd.pipeline import metrics, runs
from offline_bkd.pipeline.config import dump_config
from offline_bkd.pipeline.evaluate import Evaluation
from offline_bkd.pipeline.show.evaluation import keep_evaluation

PART = {"size": "10 samples of 10 classes", "samples": "a", "labels": "b", "images": "c"}


def class_counts(classes: int) -> np.ndarray:
    return np.geomspace(500, 5, classes).astype(int)


def answers(classes: int, skill: float, seed: int, images: int = 20) -> metrics.Answers:
    """`images` of each class; the more training samples a class has, the more are right."""
    generator = np.random.default_rng(seed)
    label = np.repeat(np.arange(classes), images)
    right = generator.random(len(label)) < np.clip(skill * class_counts(classes)[label] ** 0.25 / 4, 0, 0.97)
    # the others are taken for a neighbour, mostly
    other = (label + generator.choice([1, 1, 1, 2, 5], len(label))) % classes
    predicted = np.where(right, label, other)
    confidence = np.clip(generator.beta(4, 2, len(label)) + 0.1 * right, 0.01, 1)
    in_top5 = right | (generator.random(len(label)) < 0.5)
    return metrics.Answers(label=label, predicted=predicted, confidence=confidence, in_top5=in_top5)


def make_run(
    folder: Path,
    names: list[str],
    method: str = "bkd",
    seed: int = 0,
    skill: float = 0.6,
    evaluated: bool = True,
    overrides=(),
    part=PART,
    backbone: dict | None = None,
):
    """A complete run of `method`, "teacher" or a student's, on classes of those `names`, the images of `part`; returns it.
    Its best epoch is another than its last, and more skilled.

    It learned from the `backbone` of that experiment, else a student from one cache, the same for all.
    """
    stage = "teacher" if method == "teacher" else "student"
    config = tiny.experiment(*([] if stage == "teacher" else [f"student.method={{name: {method}}}"]), *overrides, seed=seed)
    counts, found = class_counts(len(names)), answers(len(names), skill, seed)
    scores = metrics.scores(found, counts)
    learns_from = f"{seed:064x}" if backbone else None if stage == "teacher" else "cafe" * 16
    with runs.start_run(folder, config, stage, tiny.CPU, resume=False, learns_from=learns_from) as run:
        for epoch in range(1, 21):
            progress = epoch / 20
            test = {k: v * progress if isinstance(v, float) else v for k, v in scores.items()}
            timing = {"seconds": 1.0, "data_share": 0.1, "images_per_second": 9.0}
            run.append_metrics({"epoch": epoch, "loss": 4 * np.exp(-2 * progress), **timing, "test": test})
        weights = {"weight": torch.full((3,), skill)}
        run.save_tensors("last", weights, epoch=20)
        run.save_tensors("best", weights, epoch=20)
        about = {"method": method, "seed": seed, "classes": names, "class_counts": counts.tolist()}
        data = {"dataset": part, "test_dataset": part, "teacher": None, "backbone": backbone, "digest": runs.digest(weights)}
        last = {"epoch": 20, **scores}
        best = {"epoch": 12, **metrics.scores(answers(len(names), 1.2 * skill, seed), counts)}
        run.write_summary({**about, **data, "last": last, "best": best, "seconds": 12.3, "image_size": [8, 8]})
    if evaluated:
        evaluation = Evaluation(
            run=run,
            checkpoint="last",
            digest=runs.digest(weights),
            test_dataset=part,
            classes=tuple(names),
            class_counts=counts,
            precision="float32",
            answers=found,
        )
        keep_evaluation(evaluation, None)
    assert dump_config(run.config()) == dump_config(config)
    return run
