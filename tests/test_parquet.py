"""Parquet as data: what layouts are read, and what is wrong with a file, named before training."""

import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pictures import png

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.data import datasets


def parquet(folder, labels, name="train-0.parquet", names=("cat", "dog"), images=None, column="label"):
    """Parquet in the Hugging Face layout: one 6x5 PNG a label, its first pixel the row number."""
    images = images or [png(row) for row in range(len(labels))]
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": data, "path": None} for data in images],
                pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            ),
            column: pa.array(labels, pa.int64()),
        }
    )
    features = {"image": {"_type": "Image"}, column: {"names": list(names), "_type": "ClassLabel"}} if names else {}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), folder / name)


def section(folder, **values):
    return schema.Parquet(name="parquet", root=str(folder), train="train-*.parquet", test="test-*.parquet", **values)


def test_parquet_is_read_from_one_or_many_shards(tmp_path):
    parquet(tmp_path, [0, 1, 1], "train-0.parquet")
    parquet(tmp_path, [1, 0], "train-1.parquet", images=[png(3), png(4)])
    parquet(tmp_path, [0, 1], "test-0.parquet")
    train, test, _ = datasets.load(section(tmp_path))
    assert train.classes == ("cat", "dog") and train.label.tolist() == [0, 1, 1, 1, 0] and len(test) == 2
    assert [np.asarray(train.decode(row))[0, 0, 0] for row in range(5)] == [0, 1, 2, 3, 4]
    assert train.image_size.tolist() == [[5, 6]] * 5
    assert train.fingerprint != test.fingerprint


def test_reading_parquet_does_not_wait_for_pandas(tmp_path, checkout):
    parquet(tmp_path, [0, 1])
    parquet(tmp_path, [0, 1], "test-0.parquet")
    script = f"""
import sys
from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data import datasets
datasets.load(schema.Parquet(name="parquet", root={str(tmp_path)!r}, train="train-*.parquet", test="test-*.parquet"))
print("pandas" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], env=checkout, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.struct({"bytes": pa.binary_view(), "path": pa.string()}),
        pa.struct({"path": pa.large_string(), "bytes": pa.large_binary()}),
    ],
    ids=str,
)
def test_image_bytes_of_any_arrow_type_are_read(tmp_path, kind):
    images = [png(row) for row in range(2)]
    values = [{"bytes": data, "path": "x.png"} for data in images] if pa.types.is_struct(kind) else images
    for name in "train-0.parquet", "test-0.parquet":
        pq.write_table(pa.table({"image": pa.array(values, kind), "label": pa.array([0, 1], pa.uint8())}), tmp_path / name)
    train, _, _ = datasets.load(section(tmp_path))
    assert [np.asarray(train.decode(row))[0, 0, 0] for row in range(2)] == [0, 1]


def test_images_may_be_files_whose_paths_parquet_lists(tmp_path):
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for part in "train", "test":
        (tmp_path / part).mkdir()
        for row in range(3):
            (tmp_path / part / f"{row}.png").write_bytes(png(row))
        values = [{"bytes": None, "path": f"{part}/{row}.png"} for row in range(3)]
        table = pa.table({"image": pa.array(values, kind), "label": [0, 1, 1]})
        pq.write_table(table, tmp_path / f"{part}-0.parquet")
    train, test, _ = datasets.load(section(tmp_path))
    assert [np.asarray(train.decode(row))[0, 0, 0] for row in range(3)] == [0, 1, 2] and len(test) == 3
    assert train.images[2] == str(tmp_path / "train" / "2.png")
    (tmp_path / "train" / "1.png").unlink()
    with pytest.raises(UserError, match=r"train/1.png \(train-\*.parquet row 2\) cannot be read: No such file"):
        datasets.load(section(tmp_path))


def test_an_empty_shard_counts_for_nothing_whatever_its_types(tmp_path):
    parquet(tmp_path, [0, 1])
    parquet(tmp_path, [1, 0], "test-0.parquet")
    pq.write_table(pa.table({"image": pa.nulls(0), "label": pa.nulls(0)}), tmp_path / "train-1.parquet")
    pq.write_table(pa.table({"other": pa.nulls(0)}), tmp_path / "train-2.parquet")
    assert datasets.load(section(tmp_path))[0].label.tolist() == [0, 1]
    pq.write_table(pa.table({"image": pa.nulls(2), "label": pa.nulls(2)}), tmp_path / "train-1.parquet")
    with pytest.raises(UserError, match="train-1.parquet: column 'image' is null, not a struct with a binary field 'bytes'"):
        datasets.load(section(tmp_path))


def test_shards_that_are_not_there_are_noted(tmp_path):
    for number in (0, 2):
        parquet(tmp_path, [0, 1], f"train-0000{number}-of-00003.parquet", images=[png(number), png(number + 1)])
    parquet(tmp_path, [0, 1], "test-00000-of-00001.parquet", images=[png(9), png(8)])
    train, test, _ = datasets.load(section(tmp_path))
    (note,) = train.notes
    assert note.startswith("of the 3 shards ") and "/train-*-of-00003.parquet 2 are read; the others are empty or not" in note
    assert not test.notes


@pytest.mark.parametrize("folder", ["a[b]c", "[0-9]", "star*", "what?"])
def test_a_folder_whose_name_has_signs_of_a_pattern_is_that_folder(tmp_path, folder):
    (tmp_path / folder).mkdir()
    parquet(tmp_path / folder, [0, 1])
    parquet(tmp_path / folder, [0, 1], "test-[x].parquet", images=[png(8), png(9)])
    values = {"train": str(tmp_path / folder / "train-0.parquet"), "test": "test-[x].parquet"}
    for changed in {}, values:
        chosen = section(tmp_path / folder).model_copy(update=changed)
        assert [len(part) for part in datasets.load(chosen)[:2]] == [2, 2]


@pytest.mark.parametrize("names", [5, "ab", [1, 2], ["a", None], {"0": "a", "1": "b"}, [["a"], ["b"]], "a" * 9999])
def test_class_names_in_the_metadata_that_are_no_list_of_texts_are_one_line(tmp_path, names):
    parquet(tmp_path, [0, 1])
    parquet(tmp_path, [0, 1], "test-0.parquet")
    table = pq.read_table(tmp_path / "train-0.parquet")
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "train-0.parquet")
    with pytest.raises(
        UserError, match=r"^[^\n]{,300}train-0.parquet: the class names of 'label' in .*not a list of texts; mend"
    ):
        datasets.load(section(tmp_path))


@pytest.mark.parametrize(
    "metadata", ["[" * 100_000, "5", "null", '{"info": []}', '{"info": {"features": {"label": 5}}}', "\udcff"]
)
def test_other_metadata_are_no_ones_business(tmp_path, metadata):
    for name in "train-0.parquet", "test-0.parquet":
        parquet(tmp_path, [0, 1], name)
        table = pq.read_table(tmp_path / name).replace_schema_metadata({"huggingface": os.fsencode(metadata)})
        pq.write_table(table, tmp_path / name)
    assert datasets.load(section(tmp_path))[0].classes == ("0", "1")


@pytest.mark.parametrize("kind", [pa.float64(), pa.string(), pa.bool_(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_labels_that_are_no_whole_numbers_are_named_with_their_type(tmp_path, kind):
    values = {"double": [0.0, 1.0], "bool": [False, True]}.get(str(kind), ["a", "b"])
    pq.write_table(pa.table({"image": [png(0), png(1)], "label": pa.array(values, kind)}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"column 'label' is .*; labels are whole numbers"):
        datasets.load(section(tmp_path))


def test_a_label_beyond_64_bits_is_named(tmp_path):
    table = pa.table({"image": [png(0), png(1)], "label": pa.array([0, 2**63], pa.uint64())})
    pq.write_table(table, tmp_path / "train-0.parquet")
    parquet(tmp_path, [0, 1], "test-0.parquet")
    with pytest.raises(UserError, match=r"^[^\n]*train-0.parquet as Parquet: [^\n]*9223372036854775808 not in range[^\n]*$"):
        datasets.load(section(tmp_path))


@pytest.mark.parametrize("dictionary", [True, False], ids=["repeated", "compressed"])
def test_what_unpacks_to_many_times_its_size_is_refused_while_it_is_small(tmp_path, dictionary, monkeypatch):
    monkeypatch.setattr("offline_bkd.pipeline.data.parquet.UNPACKED", 2**20)
    image = png(0) + bytes(100_000)
    table = pa.table({"image": [image] * 200, "label": [0, 1] * 100})
    pq.write_table(table, tmp_path / "train-0.parquet", use_dictionary=dictionary, compression="zstd")
    parquet(tmp_path, [0, 1], "test-0.parquet")
    assert (tmp_path / "train-0.parquet").stat().st_size < 60_000
    if not dictionary:  # by what the file says of itself
        monkeypatch.setattr("offline_bkd.pipeline.data.parquet._batches", None)
    with pytest.raises(
        UserError, match="train-0.parquet unpacks to more than 100 times its size, .*; write its images as they"
    ):
        datasets.load(section(tmp_path))


def test_a_pipe_or_a_folder_that_the_pattern_matches_is_refused(tmp_path):
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match="train-0.parquet is no regular file; data.train names Parquet files"):
        datasets.load(section(tmp_path))
    os.unlink(tmp_path / "train-0.parquet")
    (tmp_path / "train-0.parquet").mkdir()
    with pytest.raises(UserError, match="train-0.parquet is a folder; data.train names Parquet files"):
        datasets.load(section(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": [0, 2, -1]},
            r"sample 1: label 2 is outside 0 … 1 \(2 such samples in the training part, .* from -1 to 2\)",
        ),
        ({"labels": [0, 0, 0]}, r"1 class without a training sample, but with 1 image in the test part: 'dog'"),
        ({"labels": [0, None, 1]}, r"must hold whole numbers without gaps"),
        ({"labels": [0, 1], "images": [png(0), None]}, r"row 1 has no image bytes"),
        ({"labels": [0, 1], "column": "fine"}, r"has no column 'label' but image, fine"),
        ({"labels": []}, r"train-\*\.parquet holds no samples"),
    ],
)
def test_what_is_wrong_with_parquet_is_named(tmp_path, change, message):
    parquet(tmp_path, **change)
    parquet(tmp_path, [0, 1], "test-0.parquet")
    with pytest.raises(UserError, match=message):
        datasets.load(section(tmp_path))


def test_a_pattern_that_matches_nothing_and_a_file_that_is_no_parquet_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file matches 'train-\*\.parquet'"):
        datasets.load(section(tmp_path))
    (tmp_path / "train-0.parquet").write_text("no")
    with pytest.raises(UserError, match=r"cannot read .*train-0.parquet as Parquet"):
        datasets.load(section(tmp_path))


def test_an_image_column_without_bytes_is_named(tmp_path):
    pq.write_table(pa.table({"image": ["a"], "label": [0]}), tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"column 'image' is string, not a struct with a binary field 'bytes'"):
        datasets.load(section(tmp_path))


def test_class_names_that_differ_between_shards_or_parts_are_refused(tmp_path):
    parquet(tmp_path, [0, 1], "train-0.parquet")
    parquet(tmp_path, [0, 1], "test-0.parquet", names=("dog", "cat"))
    with pytest.raises(UserError, match="the training and the test part differ in their classes: their order differs"):
        datasets.load(section(tmp_path))
    parquet(tmp_path, [0, 1], "train-1.parquet", names=("dog", "cat"))
    with pytest.raises(UserError, match="train-1.parquet: class names differ"):
        datasets.load(section(tmp_path))
