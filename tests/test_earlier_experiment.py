"""An earlier version's teacher and cache go on serving: students, checks and the rest of a dump.

tests/experiments/0.1.0.dev1 is what c26b6d0 wrote for the config.yaml in it (pictures and the best epoch are left out), of
before a cache kept its teacher's method and how its answers were computed.
"""

import json
import shutil
from pathlib import Path

import pytest
from test_cli import run

KEPT = Path(__file__).parent / "experiments/0.1.0.dev1"


@pytest.fixture
def experiment(tmp_path):
    return shutil.copytree(KEPT, tmp_path / "experiment")


def done(*arguments):
    result = run(*arguments, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("method", ["bkd", "kd"])
def test_a_student_learns_from_its_cache(experiment, method):
    chosen = "--config", experiment / "config.yaml", "-o", f"student.method={{name: {method}}}"
    done("train-student", *chosen, "--cache", experiment / "cache", "--out", experiment / "student")
    summary = json.loads((experiment / "student/summary.json").read_text())
    teacher = json.loads((experiment / "teacher/summary.json").read_text())
    assert summary["last"]["epoch"] == 3 and summary["teacher"]["digest"] == teacher["digest"]


def test_a_student_learns_from_its_backbone(experiment):
    chosen = "--config", experiment / "config.yaml", "-o", "student.method={name: crt}"
    done("train-student", *chosen, "--backbone", experiment / "teacher", "--out", experiment / "student")


def test_its_teacher_scores_and_answers_as_it_did(experiment):
    scores = json.loads(done("evaluate", experiment / "teacher", "--json"))
    summary = json.loads((experiment / "teacher/summary.json").read_text())
    assert scores["top1"] == pytest.approx(summary["last"]["top1"], abs=0.5)  # two of 400 images: processors round otherwise
    assert "PASSED" in done("verify", experiment / "cache", "--teacher", experiment / "teacher")


def test_its_dump_is_finished(experiment):
    for name in "probability/c.3.0.0", "done/3.0":
        (experiment / "cache" / name).unlink()
    chosen = "--config", experiment / "config.yaml", "--teacher", experiment / "teacher"
    done("dump-logits", *chosen, "--out", experiment / "cache", "--resume")
    assert "PASSED" in done("verify", experiment / "cache", "--teacher", experiment / "teacher", "--views", 9)
