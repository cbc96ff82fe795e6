"""Answers about any images: as the network gives them in evaluation, and what cannot be read is named."""

import io
import os
import shutil

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import torch
from PIL import Image

import cli
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.evaluate import infer, load_model
from offline_bkd.pipeline.predict import predict
from offline_bkd.pipeline.show import progress
from offline_bkd.pipeline.train import train_teacher


@pytest.fixture(scope="module")
def digits():
    """Forty test images, and what is known of them."""
    _, test_set, _ = datasets.load(tiny.experiment().data)
    return test_set.take(np.arange(40))


@pytest.fixture(scope="module")
def photos(tmp_path_factory, digits):
    """A folder of the same images as files, in folders below it."""
    folder = tmp_path_factory.mktemp("photos")
    for row in range(len(digits)):
        (folder / str(row % 3)).mkdir(exist_ok=True)
        digits.decode(row).save(folder / str(row % 3) / f"{row:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


def write_parquet(path, digits, count: int) -> None:
    """The first `count` images as PNG, beside another column."""
    encoded = []
    for row in range(count):
        file = io.BytesIO()
        digits.decode(row).save(file, "png")
        encoded.append({"bytes": file.getvalue(), "path": f"{row}.png"})
    pyarrow.parquet.write_table(pyarrow.table({"n": range(count), "photo": encoded}), path)


def expected(run_folder, digits) -> np.ndarray:
    """Probabilities as evaluation has them, [40, 10]."""
    run = runs.open_run(run_folder)
    model = load_model(run, "last", run.config(), 10)
    images = open_images(digits, run.config().views, tiny.CPU, 0)
    return torch.softmax(infer(model, images, np.arange(len(digits))), 1).numpy()


def test_a_folders_answers_are_those_of_evaluation(tmp_path, teacher_run, photos, digits):
    out, wanted = tmp_path / "answers.parquet", expected(teacher_run, digits)
    assert predict(str(teacher_run), [str(photos)], str(out), "last", tiny.CPU, probabilities=True) == []
    table = pandas.read_parquet(out)
    rows = [int(file[-6:-4]) for file in table["file"]]
    assert sorted(rows) == list(range(40)) and table["file"].is_monotonic_increasing
    np.testing.assert_allclose(table[[f"p_{name}" for name in digits.classes]], wanted[rows], rtol=1e-5, atol=1e-7)
    order = np.argsort(-wanted[rows], axis=1, kind="stable")
    for place, ending in enumerate(["", "_2", "_3", "_4", "_5"]):
        assert (table[f"class{ending}"] == np.array(digits.classes)[order[:, place]]).all()
        np.testing.assert_allclose(
            table[f"confidence{ending}"], np.take_along_axis(wanted[rows], order, 1)[:, place], rtol=1e-5
        )
    assert list(table.columns[:3]) == ["file", "class", "confidence"] and len(table.columns) == 1 + 2 * 5 + 10


def test_parquet_and_files_are_taken_together_and_the_table_is_printed_alone(
    teacher_run, photos, digits, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0)  # so that how far it is would be printed too
    write_parquet(tmp_path / "some.parquet", digits, 3)
    with pytest.raises(SystemExit) as end:
        cli.main(
            ["predict", str(teacher_run), str(tmp_path / "some.parquet"), str(photos / "1" / "01.png"), "--device", "cpu"]
        )
    assert end.value.code == 0
    output = capsys.readouterr()
    table = pandas.read_csv(io.StringIO(output.out), dtype={"class": str})
    assert "images/s" in output.err
    wanted = expected(teacher_run, digits)
    assert table["file"].tolist() == [*(f"{tmp_path}/some.parquet sample {n}" for n in range(3)), str(photos / "1" / "01.png")]
    assert table["class"].tolist() == [digits.classes[c] for c in wanted[[0, 1, 2, 1]].argmax(1)]
    assert "p_3" not in table


def test_the_command_answers_for_every_class_by_the_checkpoint_that_it_is_told(teacher_run, photos, digits, tmp_path, capsys):
    run, image = shutil.copytree(teacher_run, tmp_path / "run"), str(photos / "1" / "01.png")
    predict(str(run), [image], str(tmp_path / "answers.csv"), "best", tiny.CPU, probabilities=True)
    (run / "last.safetensors").unlink()  # the default
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["predict", str(run), image, "--probabilities", "--checkpoint", "best", "--device", "cpu"])
    assert end.value.code == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "answers.csv").read_text() and f"p_{digits.classes[9]}" in table.splitlines()[0]


def test_parquet_is_read_as_it_is_answered_and_only_when_every_source_is_there(teacher_run, digits, tmp_path, monkeypatch):
    monkeypatch.setattr("offline_bkd.pipeline.data.parquet.ROWS", 1)
    monkeypatch.setattr("offline_bkd.pipeline.predict.PIECE", 2)
    done, batches = [], pyarrow.parquet.ParquetFile.iter_batches

    def read(*arguments, **named):
        for batch in batches(*arguments, **named):
            done.append("read")
            yield batch

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", read)
    monkeypatch.setattr(
        "offline_bkd.pipeline.predict.infer", lambda *given, **named: done.append("answered") or infer(*given, **named)
    )
    source, out = tmp_path / "some.parquet", tmp_path / "answers.csv"
    write_parquet(source, digits, 5)
    with pytest.raises(UserError, match="there is no nowhere.parquet"):
        predict(str(teacher_run), [str(source), "nowhere.parquet"], str(out), "last", tiny.CPU)
    assert not done
    assert predict(str(teacher_run), [str(source)], str(out), "last", tiny.CPU) == []
    assert done == [*["read", "read", "answered"] * 2, "read", "answered"]
    assert pandas.read_csv(out)["file"].tolist() == [f"{source} sample {row}" for row in range(5)]


def test_a_folder_s_images_are_those_that_training_would_take(teacher_run, photos, tmp_path, capsys, monkeypatch):
    folder, out = tmp_path / "photos", tmp_path / "answers.csv"
    for name in "photos/a.png", "photos/._a.png", "photos/.thumbnails/a.png", "photos/b.heic", "elsewhere/c.PNG":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((photos / "1" / "01.png").read_bytes())
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert predict(str(teacher_run), [str(folder)], str(out), "last", tiny.CPU) == []
    assert pandas.read_csv(out)["file"].tolist() == [f"{folder}/a.png", f"{folder}/linked/c.PNG"]
    assert f"note: {folder}: 3 files left out (2 hidden, 1 .heic); images are .avif, " in capsys.readouterr().err
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("linked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read the folder .*linked: Permission denied"):
        predict(str(teacher_run), [str(folder)], str(tmp_path / "none.csv"), "last", tiny.CPU)


def test_a_column_for_each_class_is_made_only_where_it_is_asked_for(teacher_run, photos, tmp_path, monkeypatch):
    made, array = [], pyarrow.array
    monkeypatch.setattr(pyarrow, "array", lambda values: made.append(array(values)) or made[-1])
    predict(str(teacher_run), [str(photos / "1" / "01.png")], str(tmp_path / "answers.csv"), "last", tiny.CPU)
    assert len(made) == 1 + 2 * 5


def test_what_cannot_be_read_or_is_of_another_size_is_named_and_left_out(teacher_run, photos, tmp_path, capsys):
    (tmp_path / "torn.png").write_bytes((photos / "1" / "01.png").read_bytes()[:40])
    (tmp_path / "none.png").write_text("nothing")
    Image.new("RGB", (9, 8)).save(tmp_path / "wide.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png")
    out = tmp_path / "answers.csv"
    command = ["predict", str(teacher_run), str(tmp_path), "--out", str(out), "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert f"skipped: {tmp_path}/torn.png cannot be read as an image" in said
    assert f"skipped: {tmp_path}/none.png cannot be read as an image: no known format" in said
    assert f"skipped: {tmp_path}/wide.png is 8 x 9 pixels, the network takes 8 x 8" in said
    assert pandas.read_csv(out)["file"].tolist() == [f"{tmp_path}/fine.png"]
    assert not list(tmp_path.glob("*.partial"))
    for place in ["--out", str(tmp_path / "none.csv")], []:
        with pytest.raises(SystemExit) as end:
            cli.main([*command[:2], *(str(tmp_path / name) for name in ("torn.png", "wide.png")), *place, "--device", "cpu"])
        said = capsys.readouterr()
        assert end.value.code == 2 and said.out.count("\n") <= 1 and not (tmp_path / "none.csv").exists()
        assert said.err.splitlines()[-1] == "error: no image is left to answer about, of 2 images; name others"


def test_resized_crops_are_evaluations_centre(tmp_path, photos, digits):
    """Images of any size, for a network whose crops are resized."""
    experiment = tiny.experiment(
        "views={name: random_resized_crop, size: 8, count: 2}", "teacher.training.epochs=1", "data.workers=0"
    )
    train_teacher(experiment, str(tmp_path / "run"), tiny.CPU)
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "wide.png")
    out = tmp_path / "answers.parquet"
    sources = [str(photos), str(tmp_path / "wide.png")]
    assert predict(str(tmp_path / "run"), sources, str(out), "last", tiny.CPU, probabilities=True) == []
    table = pandas.read_parquet(out)
    rows = [int(file[-6:-4]) for file in table["file"][:-1]]
    found = table[[f"p_{name}" for name in digits.classes]][:-1]
    np.testing.assert_allclose(found, expected(tmp_path / "run", digits)[rows], rtol=1e-5, atol=1e-7)


def test_what_there_is_not_is_refused_before_anything_is_done(teacher_run, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("offline_bkd.pipeline.predict.load_model", None)
    (tmp_path / "empty").mkdir()
    for sources, out, message in (
        ([str(photos), "nowhere.png"], "a.csv", "there is no nowhere.png; name image files, folders"),
        ([str(tmp_path / "empty")], "a.csv", "empty holds no images; name others"),
        (["nowhere.png"], "a.txt", "is neither a .csv nor a .parquet file"),
        ([str(photos)], "none/a.csv", "there is no folder .*none; make it"),
    ):
        with pytest.raises(UserError, match=message):
            predict(str(teacher_run), sources, str(tmp_path / out), "last", tiny.CPU)
    (tmp_path / "taken.csv").write_text("mine")
    (tmp_path / "linked.csv").symlink_to(tmp_path / "nowhere.csv")
    for name in "taken.csv", "linked.csv":
        with pytest.raises(UserError, match=f"{name} exists; choose another file"):
            predict(str(teacher_run), ["nowhere.png"], str(tmp_path / name), "last", tiny.CPU)
    pyarrow.parquet.write_table(pyarrow.table({"n": [1], "m": ["x"]}), tmp_path / "no.parquet")
    with pytest.raises(UserError, match="no.parquet: images are in a column of bytes, .*; there are none among n, m; name it"):
        predict(str(teacher_run), [str(tmp_path / "no.parquet")], str(tmp_path / "b.csv"), "last", tiny.CPU)
    pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), tmp_path / "no.parquet")
    with pytest.raises(UserError, match="no.parquet holds no images; name others"):
        predict(str(teacher_run), [str(tmp_path / "no.parquet")], str(tmp_path / "b.csv"), "last", tiny.CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "linked.csv", "no.parquet", "taken.csv"]
