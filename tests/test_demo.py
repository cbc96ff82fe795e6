"""`make demo` for one seed: what README says of BKD shows on handwritten digits."""

from pathlib import Path

import tiny

from offline_bkd.pipeline import runs
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.show.report import write_report
from offline_bkd.pipeline.train import train_student, train_teacher

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


def test_a_bkd_student_learns_few_shot_classes_that_a_kd_student_does_not(tmp_path):
    teacher, cache = str(tmp_path / "teacher"), str(tmp_path / "cache.zarr")
    train_teacher(load_config(CONFIG), teacher, tiny.CPU)
    dump_logits(load_config(CONFIG), [teacher], cache, tiny.CPU)
    for method in "kd", "bkd":
        student = load_config(CONFIG, (f"student.method.name={method}",))
        train_student(student, cache, str(tmp_path / method), tiny.CPU)
    scores = {name: runs.open_run(tmp_path / name).summary()["last"] for name in ("teacher", "kd", "bkd")}
    # results/digits-cpu.json, three seeds: KD 51.5 to 58.5, BKD 76.5 to 85.0
    few = {name: found["few"] for name, found in scores.items()}
    assert few["bkd"] > few["kd"] + 10 and scores["bkd"]["top1"] > scores["kd"]["top1"]
    answer, _ = write_report([teacher, str(tmp_path / "kd"), str(tmp_path / "bkd")], str(tmp_path / "report"))
    assert answer == (
        f"BKD student: {scores['bkd']['top1']:.1f} % of the test images are right, {few['bkd']:.1f} % in few-shot classes; "
        f"{scores['bkd']['top1'] - scores['teacher']['top1']:+.1f} points over teacher, "
        f"{few['bkd'] - few['teacher']:+.1f} in few-shot classes"
    )
