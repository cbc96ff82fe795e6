"""Sets larger than memory: read from a copy in which any image can be read alone, made once, whole or not at all."""

import os
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
from pictures import png
from test_parquet import parquet, section

from offline_bkd.cache.views import RandomResizedCrop
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.data import datasets, image_copy
from offline_bkd.pipeline.data.images import DecodedImages


@pytest.fixture
def large(tmp_path, monkeypatch):
    """Two shards of training images, above what is held in memory, and a small test part."""
    monkeypatch.setattr("offline_bkd.pipeline.data.parquet.IN_MEMORY", 2000)
    monkeypatch.setattr("offline_bkd.pipeline.data.parquet.ROWS", 7)
    for shard in range(2):
        images = [png(row, (6 + row % 3, 5)) for row in range(20 * shard, 20 * shard + 20)]
        parquet(tmp_path, [0, 1] * 10, f"train-{shard}.parquet", images=images)
    parquet(tmp_path, [0, 1], "test-0.parquet", images=[png(200), png(201)])
    return tmp_path


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("copies/*") if path.suffix != ".lock")


def test_an_image_in_two_parts_is_noted_where_one_is_copied(large):
    parquet(large, [0, 1], "test-0.parquet", images=[png(7, (7, 5)), png(201)])
    train, test, _ = datasets.load(section(large))
    assert train.image_digest is not None and test.image_digest is None
    assert "1 test image among the training images too" in test.notes[-1]


def test_a_copy_is_the_same_set_as_what_it_is_of(large, monkeypatch):
    copied, _, _ = datasets.load(section(large))
    monkeypatch.setattr("offline_bkd.pipeline.data.parquet.IN_MEMORY", 2**30)
    held, _, _ = datasets.load(section(large))
    assert len(copies(large)) == 1 and copied.classes == held.classes and len(copied) == 40
    np.testing.assert_array_equal(copied.label, held.label)
    np.testing.assert_array_equal(copied.image_size, held.image_size)
    assert list(copied.images) == list(held.images)
    np.testing.assert_array_equal(copied.take(np.array([39, 3])).decode(0), held.decode(39))
    assert copied.take(np.array([39, 3])).image_size.tolist() == held.image_size[[39, 3]].tolist()


def test_any_image_is_read_alone_and_also_in_worker_processes(large, monkeypatch):
    train, _, _ = datasets.load(section(large))
    size = len(train.images[33])
    read, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, length, start: read.append(length) or pread(file, length, start))
    assert np.asarray(train.decode(33))[0, 0, 0] == 33 and read == [size]
    rows, views = np.random.default_rng(0).permutation(40), np.arange(40) % 3
    alone, shared = (
        [
            batch.images
            for batch in DecodedImages(train, RandomResizedCrop(size=4, count=3), tiny.CPU, workers).batches(rows, views, 8)
        ]
        for workers in (0, 2)
    )
    assert all((one == other).all() for one, other in zip(alone, shared))


def test_a_copy_is_made_once_and_again_where_its_source_has_changed(large, monkeypatch):
    first, _, _ = datasets.load(section(large))
    monkeypatch.setattr(image_copy, "_write", None)
    again, _, _ = datasets.load(section(large), download=False)
    assert again.fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setattr("offline_bkd.pipeline.data.parquet.IN_MEMORY", 2000)
    parquet(large, [0, 1] * 10, "train-1.parquet", images=[png(row) for row in range(100, 120)])
    changed, _, _ = datasets.load(section(large))
    assert len(copies(large)) == 2 and np.asarray(changed.decode(20))[0, 0, 0] == 100
    assert {key for key in first.fingerprint if first.fingerprint[key] != changed.fingerprint[key]} == {"images"}


def test_a_dry_run_makes_no_copy(large):
    with pytest.raises(UserError, match=r"are read from a copy in .*/copies, which is yet to be made, .* leave out --dry-run"):
        datasets.load(section(large), download=False)
    assert not (large / "copies").exists()


def test_a_copy_lies_where_data_copies_says(large, tmp_path, monkeypatch):
    datasets.load(section(large, copies="elsewhere/deep"))
    assert not (large / "copies").exists() and list(tmp_path.glob("elsewhere/deep/*.images"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    datasets.load(section(large, copies="${SCRATCH}/deep"))
    assert list(tmp_path.glob("scratch/deep/*.images"))


def test_a_copy_that_finds_no_room_is_one_line(large, monkeypatch):
    (large / "copies").write_text("a file")
    with pytest.raises(
        UserError, match=r"^cannot copy .* to .*/copies: File exists; make room, or give -o data.copies=FOLDER$"
    ):
        datasets.load(section(large))
    (large / "copies").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5}))
    with pytest.raises(UserError, match=r"cannot copy .*: 0.0 GB are free there; make room"):
        datasets.load(section(large))


def test_an_interrupted_copy_is_none_and_is_made_again(large, monkeypatch):
    pack = image_copy.END
    monkeypatch.setattr(image_copy, "END", None)  # it stops before the end is written
    with pytest.raises(AttributeError):
        datasets.load(section(large))
    assert not copies(large), "the disk has its room back"
    monkeypatch.setattr(image_copy, "END", pack)
    assert len(datasets.load(section(large))[0]) == 40 and [Path(name).suffix for name in copies(large)] == [".images"]


def test_what_a_killed_writer_left_of_a_copy_is_removed_and_a_link_is_not_followed(large):
    datasets.load(section(large))
    (name,) = copies(large)
    whole = (large / "copies" / name).read_bytes()
    (large / "copies" / name).unlink()
    (large / "precious").write_bytes(b"mine")
    (large / "copies" / f"{name}.00000000000000aa.partial").write_bytes(whole[:100])
    (large / "copies" / f"{name}.00000000000000ab.partial").symlink_to(large / "precious")
    datasets.load(section(large))
    assert (large / "precious").read_bytes() == b"mine" and (large / "copies" / name).read_bytes() == whole
    assert copies(large) == [name]


def test_processes_that_want_the_same_copy_make_it_once(large, monkeypatch):
    made, write = [], image_copy._write
    monkeypatch.setattr(image_copy, "_write", lambda *arguments: made.append(1) or write(*arguments))
    threads = [threading.Thread(target=datasets.load, args=(section(large),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_a_flipped_bit_in_a_copy_is_noticed_wherever_it_is(large):
    datasets.load(section(large))
    path = large / "copies" / copies(large)[0]
    whole = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, len(whole) * 8, 120):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"\.images is damaged( \(sample \d+\))?; remove it, and it is made again"):
            list(datasets.load(section(large))[0].images)
    for length in 0, 10, len(whole) // 2, len(whole) - 1:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="is damaged; remove it"):
            datasets.load(section(large))


def test_images_that_do_not_decode_are_named_and_no_copy_is_left(large):
    parquet(large, [0, 1] * 10, "train-1.parquet", images=[b"no" if row in (3, 9) else png(row) for row in range(20)])
    with pytest.raises(
        UserError, match=r"sample 23 cannot be read as an image: no known format; sample 29 .*: replace or remove"
    ):
        datasets.load(section(large))
    parquet(large, [0, 1] * 10, "train-1.parquet", images=[None if row == 3 else png(row) for row in range(20)])
    with pytest.raises(UserError, match=r"row 23 has no image bytes"):
        datasets.load(section(large))
    assert not copies(large), "the disk has its room back"


def test_repeated_values_that_unpack_to_more_than_memory_is_taken_for_are_copied_too(large):
    table = pq.read_table(large / "train-0.parquet").slice(0, 1)
    table = table.take([0] * 200).append_column("again", [list(range(200))])
    pq.write_table(table.set_column(1, "label", [[0, 1] * 100]).drop_columns(["again"]), large / "train-0.parquet")
    (large / "train-1.parquet").unlink()
    assert len(datasets.load(section(large))[0]) == 200 and len(copies(large)) == 1
