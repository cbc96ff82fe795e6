"""A store is a table: one row a (view, sample)."""

import errno
import os
import re

import numpy as np
import pandas
import pytest
from cache_store import CLASSES, answers, arguments, dump, fill, identity

from offline_bkd.cache import CacheError, RandomResizedCrop, create_cache, format, frame, open_cache
from offline_bkd.cache.calibration import calibration_error


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return dump(tmp_path_factory.mktemp("table") / "s")


def test_a_view_gives_one_row_a_sample_with_what_the_teacher_said(cache):
    table, given, p = cache.to_pandas(view=3), arguments(), answers(3)
    assert list(table.columns) == [
        "sample_id", "label", "class_name", "view", "top", "left", "height", "width", "flip",
        "predicted", "predicted_class", "confidence", "entropy", "shot", "correct",
    ]  # fmt: skip
    assert (table.sample_id == given["sample_id"]).all() and (table.label == given["label"]).all()
    assert (table.class_name == np.array(CLASSES)[given["label"]]).all() and (table.view == 3).all()
    assert (table.predicted == p.argmax(1)).all() and (table.predicted_class == np.array(CLASSES)[p.argmax(1)]).all()
    assert (table.confidence == p.max(1)).all() and (table.correct == (p.argmax(1) == given["label"])).all()
    exact = p.astype(np.float64)
    np.testing.assert_allclose(table.entropy, -(exact * np.log(exact)).sum(1), rtol=1e-5)


def test_the_crop_is_the_views(cache):
    row = cache.to_pandas(view=3, sample=10).iloc[0]
    assert (row.top, row.left, row.height, row.width, row.flip) == (-1, 0, 8, 8, True)


def test_seeded_crops_are_each_samples_own(tmp_path):
    views = RandomResizedCrop(size=8, count=2, seed=5)
    table = dump(tmp_path / "s", identity=identity(views=views)).to_pandas(view=1)
    given = arguments()
    boxes = views.boxes(given["sample_id"], np.ones(360, int), given["image_size"])
    assert (table[["top", "left", "height", "width"]].to_numpy() == np.stack(boxes[:4], 1)).all()


def test_shot_groups_follow_the_training_counts(cache):
    table = cache.to_pandas(view=0)
    groups = table.groupby("class_name").shot.first().to_dict()
    assert groups == dict(zip(CLASSES, ("many", "many", "medium", "medium", "few"), strict=False))


def test_all_views_come_by_view_and_then_by_position(cache):
    table = cache.to_pandas()
    assert len(table) == 18 * 360 and (table.view == np.repeat(np.arange(18), 360)).all()


def test_filters_choose_views_samples_and_classes(cache):
    table = cache.to_pandas(view=[2, 0], sample=[3, 10, 17, 2516], label=None)
    assert table.view.tolist() == [2] * 4 + [0] * 4 and table.sample_id.tolist() == [3, 10, 17, 2516] * 2
    assert set(cache.to_pandas(view=0, label="bear").label) == {3}
    assert set(cache.to_pandas(view=0, label=["apple", 4]).label) == {0, 4}
    assert len(cache.to_pandas(view=0, label=1)) == 101


def test_a_choice_of_nothing_is_a_table_of_no_rows(cache):
    bear = cache.sample_id[cache.label == 3][0]
    table = cache.to_pandas(view=0, sample=int(bear), label="apple")
    assert len(table) == 0 and "confidence" in table.columns


@pytest.mark.parametrize("nothing", [{"view": []}, {"view": 1, "sample": []}, {"label": []}, {"view": [], "label": "bear"}])
@pytest.mark.parametrize("kind", ["probability", "klt"])
def test_a_choice_of_no_view_sample_or_class_has_the_same_columns(tmp_path, kind, nothing):
    fit = {"fit": lambda views: np.stack([answers(view) for view in views])}
    cache = dump(tmp_path / "s", encoding={"name": kind}, **fit)
    table = cache.to_pandas(**nothing, probabilities=True)
    assert len(table) == 0 and table.dtypes.equals(cache.to_pandas(view=1, probabilities=True).dtypes)
    assert cache.export_parquet(tmp_path / "t.parquet", **nothing) == 0


def test_numbers_may_be_numpys(cache):
    expected = cache.to_pandas(view=[2, 0], sample=[10, 17])
    for kind in np.int32, np.uint8:
        found = cache.to_pandas(view=np.array([2, 0], kind), sample=[kind(10), kind(17)])
        assert found.equals(expected)
    assert cache.to_pandas(view=np.int64(2), label=np.int16(3)).equals(cache.to_pandas(view=2, label="bear"))
    assert cache.to_pandas(view=range(2), label={3}).equals(cache.to_pandas(view=[0, 1], label=3))


def test_probabilities_come_as_a_column_a_class(cache):
    table = cache.to_pandas(view=5, label="beaver", probabilities=True)
    chosen = arguments()["label"] == 4
    assert (table[[f"p_{name}" for name in CLASSES]].to_numpy() == answers(5)[chosen]).all()


@pytest.mark.parametrize(
    "choice, message",
    [
        ({"view": 18}, "there is no view 18: the store has views 0 to 17"),
        ({"sample": 4}, "there is no sample 4: the store has ids from 3 to 2516"),
        ({"label": "aple"}, "there is no class 'aple'; did you mean 'apple'?"),
        ({"label": "5"}, "there is no class '5'; names are 'a"),
        ({"label": 5}, "there is no class 5; use 0 to 4 or a name"),
        ({"label": -1}, "there is no class -1; use 0 to 4 or a name"),
        ({"label": 1.0}, "there is no class 1.0; use 0 to 4 or a name"),
        ({"label": True}, "there is no class True; use 0 to 4 or a name"),
        ({"label": [np.True_]}, "there is no class np.True_; use 0 to 4 or a name"),
        ({"view": -1}, "there is no view -1: the store has views 0 to 17"),
        ({"view": 1.5}, "a view is a whole number, found 1.5; give one or several such"),
        ({"view": [0, 2.0]}, "a view is a whole number, found [0, 2.0]; give one or several such"),
        ({"view": True}, "a view is a whole number, found True"),
        ({"view": np.arange(18) == 3}, "a view is a whole number, found array([False"),
        ({"view": "3"}, "a view is a whole number, found '3'"),
        ({"sample": 10.0}, "a sample is a whole number, found 10.0"),
        ({"sample": [False]}, "a sample is a whole number, found [False]"),
        ({"sample": -4}, "there is no sample -4: the store has ids from 3 to 2516"),
    ],
)
def test_a_choice_that_is_not_there_is_refused(cache, choice, message):
    with pytest.raises(CacheError, match=re.escape(message)):
        cache.to_pandas(**choice)


def test_large_tables_are_made_in_batches_and_are_the_same(cache, monkeypatch):
    whole = cache.to_pandas(view=[0, 1], probabilities=True)
    monkeypatch.setattr(frame, "_BATCH_CELLS", 5 * 100)
    assert cache.to_pandas(view=[0, 1], probabilities=True).equals(whole)


def test_export_writes_the_same_rows_as_parquet(cache, tmp_path):
    path = tmp_path / "t.parquet"
    assert cache.export_parquet(path, view=[0, 7, 0], probabilities=True) == 720, "a view comes once"
    assert pandas.read_parquet(path).equals(cache.to_pandas(view=[0, 7], probabilities=True))
    with pytest.raises(CacheError, match="t.parquet exists; choose another file, or delete it"):
        cache.export_parquet(path)


def test_export_reads_in_duckdb(cache, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    path = tmp_path / "t.parquet"
    cache.export_parquet(path)
    query = f"select shot, count(*), avg(correct::int) from '{path}' group by shot"
    found = {shot: (rows, accuracy) for shot, rows, accuracy in duckdb.sql(query).fetchall()}
    table = cache.to_pandas()
    assert found == {shot: (len(group), pytest.approx(group.correct.mean())) for shot, group in table.groupby("shot")}


def test_a_file_that_cannot_be_written_is_refused(cache, tmp_path, monkeypatch):
    with pytest.raises(CacheError, match="x.parquet cannot be written: File name too long; make room, or name another file"):
        cache.export_parquet(tmp_path / f"{'x' * 250}.parquet", view=0)
    with pytest.raises(CacheError, match="t.parquet cannot be written: there is no folder .*/no; make it, or name another"):
        cache.export_parquet(tmp_path / "no/t.parquet", view=0)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CacheError, match="t.parquet cannot be written: No space left on device; make room, or name another"):
        cache.export_parquet(tmp_path / "t.parquet", view=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_of_two_exports_into_one_file_the_second_to_end_is_refused(cache, tmp_path, monkeypatch, links):
    path, batches = tmp_path / "t.parquet", frame._batches

    def interleaved(*arguments):
        monkeypatch.setattr(frame, "_batches", batches)
        for batch in batches(*arguments):
            yield batch
            if not path.exists():
                assert cache.export_parquet(path, view=3) == 360

    def none(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", none)
    monkeypatch.setattr(frame, "_batches", interleaved)
    with pytest.raises(CacheError, match="t.parquet exists, which it did not before; choose another file"):
        cache.export_parquet(path)
    assert pandas.read_parquet(path).view.unique().tolist() == [3] and list(tmp_path.iterdir()) == [path]


def test_an_export_follows_no_link(cache, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("mine")
    (tmp_path / "t.parquet.partial").symlink_to(kept)
    (tmp_path / "u.parquet").symlink_to(tmp_path / "nowhere")
    assert cache.export_parquet(tmp_path / "t.parquet", view=0) == 360
    with pytest.raises(CacheError, match="u.parquet exists; choose another file"):
        cache.export_parquet(tmp_path / "u.parquet", view=0)
    assert kept.read_text() == "mine" and not (tmp_path / "nowhere").exists()


def test_no_more_than_a_block_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(frame, "_BATCH_CELLS", 5 * 60)
    monkeypatch.setattr(format, "_BLOCK_BYTES", 4 * 5 * 60)
    cache = dump(tmp_path / "s")
    expected, sizes, stored_block = cache.to_pandas(probabilities=True), [], cache.stored_block
    assert (expected[[f"p_{name}" for name in CLASSES]].to_numpy().reshape(18, 360, 5)[7] == answers(7)).all()

    def block(view, number, out=None):
        found = stored_block(view, number, out)
        sizes.append(found.nbytes)
        if out is not None:
            assert cache.room is None or out.base is cache.room, "one piece of memory serves all"
            cache.room = out.base
        return found

    def plane(*_):
        raise AssertionError("a whole plane is read")

    monkeypatch.setattr(cache, "stored_block", block), monkeypatch.setattr(cache, "stored_plane", plane)
    for each in (
        lambda: cache.to_pandas(view=[1, 2], sample=[3, 10, 2516]),
        lambda: cache.export_parquet(tmp_path / "t.parquet"),
        cache.summary,
    ):
        cache.room = None
        each()
    assert max(sizes) == 60 * 5 * 4 and len(sizes) == 2 * 2 + 18 * 6 + 4 * 6 + 4, "only what has the samples asked for"


def test_a_failed_export_leaves_nothing(tmp_path):
    with create_cache(tmp_path / "s", **arguments()) as writer:
        fill(writer, [(0, 0)])
    with pytest.raises(CacheError, match="view 1, rows 0 to 359 is not dumped yet"):
        open_cache(tmp_path / "s").export_parquet(tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_the_summary_tells_identity_sizes_and_the_teachers_quality(cache):
    summary = cache.summary(planes=2)
    assert summary["identity"] == identity().to_json() and summary["complete"]
    assert summary["bytes"]["all"] == cache.nbytes
    assert 20 < summary["bytes"]["a_view_of_a_sample"] < 30
    p, label = np.concatenate([answers(0), answers(17)]), np.tile(arguments()["label"], 2)
    few = label == 4
    teacher = summary["teacher"]
    assert teacher["views"] == [0, 17] and teacher["few"]["samples"] == 19
    assert teacher["few"]["accuracy"] == pytest.approx((p.argmax(1) == label)[few].mean())
    assert teacher["all"]["confidence"] == pytest.approx(p.max(1).mean())


def test_the_summary_of_an_unfinished_store_counts_what_is_done(tmp_path):
    with create_cache(tmp_path / "s", **arguments()) as writer:
        assert open_cache(tmp_path / "s").summary()["teacher"] is None
        fill(writer, [(5, 0)])
    summary = open_cache(tmp_path / "s").summary()
    assert summary["blocks"] == {"done": 1, "all": 18, "of_a_view": 1} and not summary["complete"]
    assert summary["teacher"]["views"] == [5]


def test_calibration_error_is_zero_for_a_calibrated_teacher_and_the_gap_for_an_overconfident_one():
    confidence, correct = np.full(100, 0.75), np.arange(100) < 75
    assert calibration_error(confidence, correct) == pytest.approx(0)
    assert calibration_error(np.full(100, 1.0), correct) == pytest.approx(0.25)
    both = calibration_error(np.repeat([0.95, 0.55], 50), np.repeat([True, False], 50))
    assert both == pytest.approx(0.5 * 0.05 + 0.5 * 0.55)


def test_entropy_of_certainty_is_zero_and_of_nothing_known_is_log_c():
    assert frame.entropy(np.eye(4, dtype=np.float32)).tolist() == [0, 0, 0, 0]
    assert frame.entropy(np.full((1, 4), 0.25, np.float32))[0] == pytest.approx(np.log(4))


def test_small_blocks_share_row_groups_whose_number_takes_memory(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(frame, "_BATCHES", 5)
    assert cache.export_parquet(tmp_path / "few.parquet") == 18 * 360
    from pyarrow import parquet

    assert parquet.ParquetFile(tmp_path / "few.parquet").num_row_groups == 4, "18 blocks, five together"
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "few.parquet"), cache.to_pandas(), check_dtype=False)


def test_small_blocks_are_decoded_together_and_give_the_same_rows(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(format, "_BLOCK_BYTES", 4 * 5 * 33)  # eleven blocks a view, the last of 30 samples
    small, decoded, batch = dump(tmp_path / "s"), [], frame._batch
    choices = {}, {"view": [3, 1]}, {"sample": [3, 10, 2516]}, {"label": "bear"}
    expected = [cache.to_pandas(**choice) for choice in choices]
    monkeypatch.setattr(frame, "_batch", lambda *given: [decoded.append(len(given[2])), batch(*given)][1])
    monkeypatch.setattr(frame, "_BATCH_CELLS", 5 * 100)
    for choice, table in zip(choices, expected):
        pandas.testing.assert_frame_equal(small.to_pandas(**choice), table)
    assert decoded[:4] == [99, 99, 99, 63], "three blocks at a time"
    assert max(decoded) == 99


@pytest.mark.parametrize("encoding, array", [("logit", "logit"), ("klt", "code")])
def test_the_summary_of_a_store_that_lost_files_counts_them_and_reads_what_is_there(tmp_path, encoding, array):
    fit = {"fit": lambda views: np.stack([answers(view) for view in views])}
    cache = dump(tmp_path / "s", encoding={"name": encoding}, **fit)
    whole, reference = cache.summary(planes=18), cache.encoding.reference
    other = 5 if reference != 5 else 6
    (tmp_path / f"s/{array}/c.{other}.0.0").unlink()
    found = open_cache(tmp_path / "s").summary(planes=18)
    assert not found["complete"] and found["blocks"]["lost"] == 1 and found["temperatures"] == whole["temperatures"]
    assert found["teacher"]["views"] == [view for view in range(18) if view != other]
    if reference is not None:  # what others differ from: none is left
        (tmp_path / f"s/{array}/c.{reference}.0.0").unlink()
        found = open_cache(tmp_path / "s").summary(planes=18)
        assert found["blocks"]["lost"] == 2 and found["teacher"] is None
