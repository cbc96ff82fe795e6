"""Exported networks: the same answers where this package is not, found by doing what the README beside them says."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch

import cli
from offline_bkd.pipeline import UserError, export_model, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.evaluate import infer, load_model
from offline_bkd.pipeline.train import train_student, train_teacher


@pytest.fixture(scope="module")
def crops_run(tmp_path_factory):
    """A network whose images are of any size, resized to its own."""
    experiment = tiny.experiment(
        "views={name: random_resized_crop, size: 16, count: 2}", "teacher.training.epochs=1", "data.workers=0"
    )
    folder = tmp_path_factory.mktemp("export") / "crops"
    train_teacher(experiment, str(folder), tiny.CPU)
    return folder


def by_the_readme(folder, runs_it) -> np.ndarray:
    """The logits that the README's code finds, which `runs_it` runs in the folder, of a test image beside it."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    runs_it(f"{code}numpy.save('logits.npy', logits)")
    return np.load(folder / "logits.npy")


def elsewhere(code: str) -> None:
    """Where this package is not imported."""
    subprocess.run([sys.executable, "-I", "-c", f"{code}\nimport sys\nassert 'offline_bkd' not in sys.modules"], check=True)


@pytest.mark.parametrize(("form", "kind"), [("onnx", "whole"), ("onnx", "crops"), ("torch", "whole")])
def test_the_readme_beside_it_says_how_to_run_it(tmp_path, teacher_run, crops_run, monkeypatch, form, kind):
    if form == "onnx":
        pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
    run = runs.open_run(teacher_run if kind == "whole" else crops_run)
    facts = export_model.export_model(str(run.folder), form, str(tmp_path / "out"))
    assert "400 test images" in facts["checked"] and ("opset 20" in facts["file"]) == (form == "onnx")
    test_set = datasets.load(run.config().data)[1].take(np.arange(3))
    test_set.decode(2).save(tmp_path / "out" / "image.png")
    monkeypatch.chdir(tmp_path / "out")
    logits = by_the_readme(tmp_path / "out", elsewhere if form == "onnx" else lambda code: exec(code, {}))
    images = open_images(test_set, run.config().views, tiny.CPU, 0)
    expected = infer(load_model(run, "last", run.config(), 10), images, np.array([2]))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list(test_set.classes)


def test_a_batch_may_be_of_any_size(tmp_path, teacher_run):
    onnxruntime = pytest.importorskip("onnxruntime")
    export_model.export_model(str(teacher_run), "onnx", str(tmp_path / "out"))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape[1:]) == ("images", "tensor(uint8)", [8, 8, 3])
    assert (logits.name, logits.type, logits.shape[1:]) == ("logits", "tensor(float)", [10])
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    whole = session.run(None, {"images": pixels})[0]
    apart = np.concatenate([session.run(None, {"images": pixels[n : n + 1]})[0] for n in range(7)])
    np.testing.assert_allclose(whole, apart, rtol=1e-5, atol=1e-5)


def test_answers_that_differ_are_no_export(tmp_path, teacher_run, monkeypatch):
    read = export_model._read_torch
    changed = export_model.FORMATS["torch"]._replace(read=lambda path: lambda images: read(path)(images) + 0.001)
    monkeypatch.setitem(export_model.FORMATS, "torch", changed)
    with pytest.raises(RuntimeError, match="network's logits differ by 0.001 from the run's; nothing was written"):
        export_model.export_model(str(teacher_run), "torch", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_of_two_exports_into_one_folder_the_first_stays_whole(tmp_path, teacher_run, monkeypatch):
    kind, out = export_model.FORMATS["torch"], str(tmp_path / "out")

    def meanwhile(path):
        monkeypatch.setitem(export_model.FORMATS, "torch", kind)
        export_model.export_model(str(teacher_run), "torch", out)
        return kind.read(path)

    monkeypatch.setitem(export_model.FORMATS, "torch", kind._replace(read=meanwhile))
    with pytest.raises(UserError, match="out cannot be made: Directory not empty; name another folder"):
        export_model.export_model(str(teacher_run), "torch", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(list((tmp_path / "out").iterdir())) == 3


def test_an_expert_says_nothing_of_classes_that_it_does_not_know(tmp_path):
    train_teacher(tiny.experiment("teacher.expert=few", "teacher.training.epochs=1"), str(tmp_path / "expert"), tiny.CPU)
    export_model.export_model(str(tmp_path / "expert"), "torch", str(tmp_path / "few"))
    logits = torch.export.load(tmp_path / "few" / "model.pt2").module()(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))
    counts = np.array(runs.open_run(tmp_path / "expert").summary()["class_counts"])
    assert (torch.isinf(logits[0]).numpy() == (counts == 0)).all()


def test_a_memory_is_refused_with_the_reason(tmp_path, teacher_run):
    experiment = tiny.experiment("student.method={name: oltr}", "student.model.memory=true", "student.training.epochs=1")
    train_student(experiment, None, str(tmp_path / "oltr"), tiny.CPU, backbone=str(teacher_run))
    with pytest.raises(UserError, match=r"has a memory, whose distances .torch.cdist. no exporter takes; name another"):
        export_model.export_model(str(tmp_path / "oltr"), "torch", str(tmp_path / "out"))


def test_the_command_exports_and_refuses(tmp_path, teacher_run, monkeypatch, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    best = shutil.copytree(teacher_run, tmp_path / "best")
    (best / "last.safetensors").unlink()
    for options, code, said in (
        (["--format", "torch", "--out", str(tmp_path / "out"), "--checkpoint", "best"], 0, "logits differ by"),
        (["--format", "torch", "--out", str(tmp_path / "taken")], 2, "is not empty; name another folder"),
        (["--format", "torch", "--out", "/proc/self/out"], 2, "--out /proc/self/out cannot be made: No such file"),
        (["--format", "pickle", "--out", str(tmp_path / "other")], 2, "'pickle' is not one of 'onnx', 'torch'"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["export-model", str(best if "best" in options else teacher_run), *options])
        output = capsys.readouterr()
        assert end.value.code == code and said in output.out + output.err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--format onnx needs onnx, onnxruntime, onnxscript; run: pip install "\.\[onnx\]"$'):
        export_model.export_model(str(teacher_run), "onnx", str(tmp_path / "none"))
