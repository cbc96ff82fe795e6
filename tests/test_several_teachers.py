"""Several teachers: their average, or a cache for each, from one decode of the images."""

from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from offline_bkd import cli
from offline_bkd.cache import CacheError, format, open_cache
from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.dump import dump_logits, recipe, writing
from offline_bkd.pipeline.train import train_student, train_teacher
from offline_bkd.pipeline.verify import verify_cache


@pytest.fixture(scope="module")
def both(tmp_path_factory, teacher_run):
    """Two teachers' runs; the second has features twice as wide."""
    other = tmp_path_factory.mktemp("other") / "other"
    train_teacher(tiny.experiment("teacher.model.width=8", seed=5), str(other), tiny.CPU)
    return [str(teacher_run), str(other)]


def chunks(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("c.*")}


def test_several_teachers_are_averaged_or_kept_apart(tmp_path, both, pictures_of_runs):
    config = tiny.experiment(tiny.EXACT)
    for name, teachers in {"first": both[:1], "second": both[1:], "both": both}.items():
        dump_logits(config, teachers, str(tmp_path / f"{name}.zarr"), tiny.CPU)
    dump_logits(config, both, str(tmp_path / "apart"), tiny.CPU, apart=True)
    for name, kept in {"first": "teacher", "second": "other"}.items():
        assert chunks(tmp_path / f"{name}.zarr") == chunks(tmp_path / "apart" / f"{kept}.zarr")
    first, second, average = (open_cache(tmp_path / f"{name}.zarr") for name in ("first", "second", "both"))
    np.testing.assert_allclose(average.plane(2), (first.plane(2) + second.plane(2)) / 2, atol=1e-6)
    assert [one["digest"] for one in average.identity.teacher["average_of"]] == [
        cache.identity.teacher["digest"] for cache in (first, second)
    ]
    found = verify_cache(str(tmp_path / "both.zarr"), both, 1, None, (), tiny.CPU)
    assert found["passed"] and found == verify_cache(str(tmp_path / "both.zarr"), both[::-1], 1, None, (), tiny.CPU)
    with pytest.raises(CacheError, match="teacher.digest"):
        verify_cache(str(tmp_path / "both.zarr"), both[:1], 1, None, (), tiny.CPU)
    with pytest.raises(UserError, match="is given twice; name different teachers"):
        dump_logits(config, [both[0], both[0]], str(tmp_path / "twice.zarr"), tiny.CPU)
    train_student(config, str(tmp_path / "both.zarr"), str(tmp_path / "student"), tiny.CPU)
    assert (tmp_path / "student" / "accuracy_by_class.png").exists()


def test_caches_kept_apart_may_lie_on_an_object_store(tmp_path, teacher_run):
    config, url = tiny.experiment(tiny.EXACT), f"memory://{tmp_path.name}/apart"
    dump_logits(config, [str(teacher_run)], url, tiny.CPU, apart=True)
    assert open_cache(f"{url}/teacher.zarr").complete


def test_stores_kept_apart_go_on_where_one_is_ahead_of_the_other(tmp_path, both, monkeypatch):
    """Of `klt`, whose first view the others are stored as differences from."""
    config, write = tiny.experiment("cache.encoding={name: klt, max_error: 0.05}"), writing._write
    dump_logits(config, both, str(tmp_path / "whole"), tiny.CPU, apart=True)

    def stop_after_one(work):
        write(work[:1])
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(writing, "_write", stop_after_one)
        dump_logits(config, both, str(tmp_path / "cut"), tiny.CPU, apart=True)
    assert [len(open_cache(tmp_path / "cut" / f"{name}.zarr").committed()) for name in ("teacher", "other")] == [1, 0]
    dump_logits(config, both, str(tmp_path / "cut"), tiny.CPU, resume=True, apart=True)
    for name in "teacher.zarr", "other.zarr":
        assert chunks(tmp_path / "cut" / name) == chunks(tmp_path / "whole" / name)


def test_stores_kept_apart_may_have_blocks_of_different_sizes(tmp_path, both, monkeypatch):
    config = tiny.experiment("cache.features=true")
    monkeypatch.setattr(format, "_CHUNK_BYTES", 10_000)  # rows are 16 and 32 bytes of features, 20 of logits
    teachers = ["--teacher", both[0], "--teacher", both[1]]
    command = ["dump-logits", *tiny.options("cache.features=true"), *teachers, "--apart", "--out", str(tmp_path / "apart")]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 0, result.output
    stores = {name: open_cache(tmp_path / "apart" / f"{name}.zarr") for name in ("teacher", "other")}
    assert stores["teacher"].layout.block_rows != stores["other"].layout.block_rows
    for folder, (name, store) in zip(both, stores.items()):
        dump_logits(config, [folder], str(tmp_path / f"{name}.zarr"), tiny.CPU)
        assert store.complete and chunks(tmp_path / f"{name}.zarr") == chunks(tmp_path / "apart" / f"{name}.zarr")


def test_a_place_that_is_taken_is_refused_before_images_are_read_and_anything_is_written(tmp_path, both, monkeypatch):
    (tmp_path / "apart" / "other.zarr").mkdir(parents=True)
    (tmp_path / "apart" / "other.zarr" / "file").write_text("mine")
    monkeypatch.setattr(recipe, "open_images", None)
    with pytest.raises(CacheError, match="other.zarr is not empty"):
        dump_logits(tiny.experiment(), both, str(tmp_path / "apart"), tiny.CPU, apart=True)
    assert not (tmp_path / "apart" / "teacher.zarr").exists()
