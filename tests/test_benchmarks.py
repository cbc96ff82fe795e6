"""Benchmarks run: each on next to nothing, so that what they call is what there is."""

import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from scipy.special import softmax

from offline_bkd.cache import format as store_format
from offline_bkd.cache import open_cache
from offline_bkd.pipeline import schema

FOLDER = Path(__file__).parent.parent / "benchmarks"
SMALL = schema.CifarResNet(name="cifar_resnet", depth=8, width=4)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield
    for path in FOLDER.glob("*.py"):  # their names are plain words, which others may mean something else by
        sys.modules.pop(path.stem, None)


def test_every_one_is_imported():
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    assert "measuring" in names and len(names) > 8
    for name in names:
        __import__(name)


def test_a_dump_is_timed(tmp_path):
    import dump

    seconds = dump.measure(SMALL, 8, 24, 1, tiny.CPU, str(tmp_path))
    assert seconds.keys() == {"forward", "probability", "klt"} and min(seconds.values()) > 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_epoch_with_a_live_teacher_is_one_from_its_cache(monkeypatch, precision):
    """Beside the engine's own loop, from probabilities as they are defined: or one of the two is not what it says."""
    import train

    from offline_bkd.pipeline.training import engine

    part, _, experiment = train.load("cifar100-lt", None)
    images, teacher = train.ResidentImages(part, train.VIEWS, tiny.CPU), train.build_model(SMALL, 100, experiment.data, 1)
    live, training = train.LiveTeacher(teacher, precision), schema.Training(precision=precision, batch_size=64)

    class Cached:
        temperature = 2.0

        def prepare(self, drawn, later):
            pass

        def probability(self, rows, views, temperature):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                logits = teacher.eval()(images.crop(rows, views))
            return torch.from_numpy(softmax(logits.double().numpy() / 2, axis=1)).float()

    records, real = [], engine.train_epoch
    monkeypatch.setattr(engine, "train_epoch", lambda *given: records.append(real(*given)))
    for targets in live, Cached():
        train.ours(SMALL, experiment.student.method, training, part, images, targets, 2)()
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-6) and records[0]["kd"] > 0


def test_blocks_of_large_stores_are_whole(tmp_path, monkeypatch):
    import large

    monkeypatch.setattr(store_format, "_CHUNK_BYTES", large.CHUNK_BYTES)
    large.build(str(tmp_path / "s"), 2, 3, whole=True)
    assert open_cache(tmp_path / "s").verify_checksums() == [] and open_cache(tmp_path / "s").complete
    assert large.WORK["resume"](str(tmp_path / "s"), 2, 3) == 0


def test_figures_are_kept_beside_what_gave_them(tmp_path, capsys):
    from measuring import memory, save

    before = memory(reset=True)
    held = torch.ones(50_000_000, dtype=torch.uint8)
    assert memory() - before == pytest.approx(len(held), rel=0.1)
    for section in "local", "s3":
        save(tmp_path / "new" / "figures.json", {"seconds": 1}, "torch", section=section)
    found = json.loads((tmp_path / "new" / "figures.json").read_text())
    assert found.keys() == {"local", "s3"} and found["s3"]["seconds"] == 1
    assert {"command", "commit", "device", "processor", "versions"} < found["local"].keys()
