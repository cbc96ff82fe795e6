"""Acceptance on CIFAR-100-LT: runs where OFFLINE_BKD_DATA names a folder with cifar100-lt/ in it, in a size for CPUs.

What it says of students test_demo.py says of handwritten digits, everywhere and in less time.
"""

import os
from pathlib import Path

import pytest
import tiny

from offline_bkd.cache import open_cache
from offline_bkd.pipeline import config, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.train import train_student, train_teacher

CONFIG = Path(__file__).parent.parent / "configs" / "cifar100-lt-quick.yaml"
pytestmark = pytest.mark.skipif(
    not (Path(os.environ.get("OFFLINE_BKD_DATA", "/nonexistent")) / "cifar100-lt").is_dir(),
    reason="OFFLINE_BKD_DATA names no folder with cifar100-lt/",
)
SMALL = (
    "teacher.model.depth=8",
    "student.model.depth=8",
    "teacher.training.epochs=5",
    "student.training.epochs=5",
    "teacher.training.evaluate_every=5",
    "student.training.evaluate_every=5",
    "views={name: crop_flip, pad: 0, flip: true}",
)


def test_the_sets_are_the_published_ones():
    experiment = config.load_config(CONFIG)
    for ratio, total in ((100, 10_847), (50, 12_608), (None, 19_573)):
        data = experiment.data.model_copy(update={"imbalance_ratio": ratio})
        train, test, _ = datasets.load(data)
        assert len(train) == total and test.class_counts.tolist() == [100] * 100
    assert train.classes[:2] == ("apple", "aquarium_fish") and train.image_size[0].tolist() == [32, 32]


@pytest.mark.skipif(
    not os.environ.get("OFFLINE_BKD_LONG_TESTS"),
    reason="takes two minutes on two cores; set OFFLINE_BKD_LONG_TESTS=1 to run it (test_demo.py has the claim on digits)",
)
def test_a_bkd_student_learns_classes_that_a_kd_student_does_not(tmp_path):
    experiment = config.load_config(CONFIG, SMALL)
    train_teacher(experiment, str(tmp_path / "teacher"), tiny.CPU)
    dump_logits(experiment, [str(tmp_path / "teacher")], str(tmp_path / "cache.zarr"), tiny.CPU)
    scores = {}
    for method in ("kd", "bkd"):
        student = config.load_config(CONFIG, (*SMALL, f"student.method.name={method}"))
        train_student(student, str(tmp_path / "cache.zarr"), str(tmp_path / method), tiny.CPU)
        scores[method] = runs.open_run(tmp_path / method).summary()["last"]
    kd, bkd = scores["kd"], scores["bkd"]
    assert bkd["medium"] > kd["medium"] + 2 and bkd["few"] >= kd["few"]
    assert bkd["top1"] > 10, "chance is 1"
    table = open_cache(tmp_path / "cache.zarr").to_pandas(view=1)
    assert len(table) == 10_847 and table.groupby("shot", observed=True).label.nunique().to_dict() == {
        "many": 35, "medium": 35, "few": 30,
    }  # fmt: skip
