"""A folder of images for each class: which files count, and which are left out and said to be."""

import os
from pathlib import Path

import numpy as np
import pytest
from pictures import png
from PIL import Image
from torchvision.datasets import ImageFolder

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.data import datasets


def folder_of_images(root):
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for row in range(3):
                (root / part / name / f"{row}.png").write_bytes(png(row, (10 + row, 8)))
    return schema.ImageFolder(name="imagefolder", root=str(root))


def test_an_image_folder_has_a_class_for_each_folder(tmp_path):
    train, test, _ = datasets.load(folder_of_images(tmp_path))
    assert train.classes == ("ant", "bee") and train.class_counts.tolist() == [3, 3] and len(test) == 6
    assert train.image_size.tolist() == [[8, 10], [8, 11], [8, 12]] * 2


def test_classes_are_the_training_folders_of_which_the_test_part_may_lack_some(tmp_path, capsys):
    section = folder_of_images(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(UserError, match="1 class without a training sample: 'cow'; leave such classes out of the set"):
        datasets.load(section)
    (tmp_path / "train" / "cow" / "0.png").write_bytes(png(0))
    train, test, _ = datasets.load(section)
    assert train.classes == test.classes == ("ant", "bee", "cow") and test.class_counts.tolist() == [3, 3, 0]
    assert "1 class without a test image, and so without an accuracy: 'cow'" in capsys.readouterr().err
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(UserError, match="test has 1 class that the training part lacks: 'dog'; add training images"):
        datasets.load(section)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "beee")
    with pytest.raises(UserError, match="test has 1 class that the training part lacks: 'beee'; is it 'bee'. rename it"):
        datasets.load(section)


def test_a_part_without_images_in_folders_of_classes_is_named(tmp_path):
    section = folder_of_images(tmp_path)
    for path in (tmp_path / "test").rglob("*.png"):
        path.rename(tmp_path / "test" / f"{path.parent.name}-{path.name}")
    with pytest.raises(UserError, match="/test has no image in a class's folder; put the images of each class into a folder"):
        datasets.load(section)


def test_a_hidden_folder_of_nothing_is_not_noted(tmp_path, capsys):
    section = folder_of_images(tmp_path)
    (tmp_path / "train" / ".thumbnails").mkdir()
    datasets.load(section)
    assert "left out" not in capsys.readouterr().err


@pytest.mark.parametrize("holds", ["config.yaml", "zarr.json"])
def test_a_run_or_a_cache_among_the_classes_is_no_class(tmp_path, holds):
    section = folder_of_images(tmp_path)
    (tmp_path / "train" / "run").mkdir()
    (tmp_path / "train" / "run" / "curves.png").write_bytes(png(0))
    (tmp_path / "train" / "run" / holds).touch()
    with pytest.raises(UserError, match="train/run stands among the folders of classes, but is a run or a cache; move it"):
        datasets.load(section)


def test_folders_are_read_as_torchvision_reads_them_linked_ones_too(tmp_path):
    section = folder_of_images(tmp_path)
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for name in ("elsewhere/a.png", "elsewhere/deep/b.PNG", "train/ant/zz.png"):
        (tmp_path / name).write_bytes(png(7))
    (tmp_path / "train" / "ant" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "train" / "fly").symlink_to(tmp_path / "elsewhere" / "deep")
    train, _, _ = datasets.load(section)
    theirs = ImageFolder(str(tmp_path / "train"))
    assert train.classes == tuple(theirs.classes) == ("ant", "bee", "fly")
    assert sorted(zip(train.images, train.label.tolist())) == sorted(theirs.samples) and len(train) == 10


def test_a_link_back_to_a_folder_that_holds_it_ends(tmp_path, capsys):
    section = folder_of_images(tmp_path)
    (tmp_path / "train" / "ant" / "round").symlink_to(tmp_path / "train" / "ant")
    (tmp_path / "train" / "ant" / "self").symlink_to("self")
    assert len(datasets.load(section)[0]) == 6
    said = capsys.readouterr().err
    assert "2 files left out (1 linked to a folder above it, 1 without a suffix)" in said


def test_what_is_left_out_is_said_with_its_count(tmp_path, capsys):
    section = folder_of_images(tmp_path)
    ant = tmp_path / "train" / "ant"
    for name in (".ipynb_checkpoints/0-checkpoint.png", ".hidden/deep/1.png", ".1.png", "a.heic", "b.HEIC", "noname", "c.txt"):
        (ant / name).parent.mkdir(parents=True, exist_ok=True)
        (ant / name).write_bytes(png(0))
    (tmp_path / "train" / "loose.png").write_bytes(png(0))
    (tmp_path / "train" / ".trash").mkdir()
    (tmp_path / "train" / ".trash" / "0.png").write_bytes(png(0))
    (tmp_path / "test" / "bee" / "Thumbs.db").write_bytes(b"")
    train, test, _ = datasets.load(section)
    assert train.class_counts.tolist() == [3, 3]
    (note,) = train.notes
    counts = "4 hidden, 2 .heic, 1 .txt, 1 outside of a class's folder, 1 without a suffix"
    assert f"{tmp_path / 'train'}: 9 files left out ({counts}); images are .avif, " in note
    assert "1 file left out (1 .db)" in test.notes[0]
    assert f"note: {note}" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".JPEG", ".webp"])
def test_files_of_these_kinds_are_images(tmp_path, suffix):
    section = folder_of_images(tmp_path)
    Image.new("RGB", (8, 8), (9, 200, 9)).save(tmp_path / "train" / "ant" / f"a{suffix}")
    train, _, _ = datasets.load(section)
    row = next(row for row, path in enumerate(train.images) if path.endswith(suffix))
    assert np.abs(np.asarray(train.decode(row), int) - [9, 200, 9]).max() < 12 and train.image_size[row].tolist() == [8, 8]


def test_a_pipe_in_the_place_of_an_image_is_named_and_not_waited_for(tmp_path):
    section = folder_of_images(tmp_path)
    os.mkfifo(tmp_path / "train" / "ant" / "pipe.png")
    with pytest.raises(UserError, match=r"pipe.png cannot be read: it is no regular file"):
        datasets.load(section)
    (tmp_path / "train" / "ant" / "pipe.png").unlink()
    train, _, _ = datasets.load(section)
    Path(train.images[0]).unlink()
    os.mkfifo(train.images[0])  # since then
    with pytest.raises(UserError, match=r"0.png cannot be read as an image: it is no regular file"):
        train.decode(0)


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    section = folder_of_images(tmp_path)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot read the folder .*bee: Permission denied"):
        datasets.load(section)


def test_names_that_are_not_utf8_are_read_and_named_in_printable_text(tmp_path):
    section = folder_of_images(tmp_path)
    path = os.path.join(os.fsencode(tmp_path), b"train/ant/caf\xe9\x1b.png")
    with open(path, "wb") as file:
        file.write(png(3))
    train, _, _ = datasets.load(section)
    row = train.images.index(os.fsdecode(path))
    assert len(train) == 7 and np.asarray(train.decode(row))[0, 0, 0] == 3 and len(train.fingerprint["images"]) == 64
    with open(path, "wb") as file:
        file.write(b"no")
    with pytest.raises(UserError, match=r"/train/ant/caf\\udce9\\x1b\.png cannot be read as an image: no known format"):
        train.decode(row)


def test_one_file_under_two_classes_or_in_both_parts_is_noted_also_by_links(tmp_path):
    section = folder_of_images(tmp_path)
    (tmp_path / "train" / "bee" / "again.png").symlink_to(tmp_path / "train" / "ant" / "1.png")
    os.link(tmp_path / "train" / "ant" / "2.png", tmp_path / "test" / "ant" / "again.png")
    _, test, _ = datasets.load(section)
    twice, both = test.notes
    assert "1 image of two labels, such as " in twice and "'ant' and 'bee'" in twice
    assert "1 test image among the training images too, such as " in both and "test/ant/again.png" in both


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*train; check data.root"):
        datasets.load(schema.ImageFolder(name="imagefolder", root=str(tmp_path)))


def test_a_class_whose_name_is_no_text_is_named(tmp_path):
    for part in "train", "test":
        for name in b"a", b"caf\xe9":
            folder = os.fsencode(tmp_path / part) + b"/" + name
            os.makedirs(folder)
            Image.new("RGB", (8, 8)).save(os.fsdecode(folder + b"/0.png"))
    with pytest.raises(UserError, match=r"the class name 'caf\\udce9' is not UTF-8 that can be printed; rename it"):
        datasets.load(schema.ImageFolder(name="imagefolder", root=str(tmp_path)))
