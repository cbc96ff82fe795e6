"""Data sets: the long-tailed draw, the layouts that are read, and what is wrong with them, named before training."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

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


def png(first: int, size=(6, 5), format="PNG", mode="RGB") -> bytes:
    pixels = np.full((size[1], size[0], 3), 9, np.uint8)
    pixels[0, 0] = first
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, format)
    return stream.getvalue()


def section(folder, **values):
    return schema.Parquet(name="parquet", root=str(folder), train="train-*.parquet", test="test-*.parquet", **values)


@pytest.mark.parametrize(
    ("classes", "largest", "ratio", "total"),
    [
        (10, 5000, 100, 12_406),
        (10, 5000, 50, 13_996),
        (10, 5000, 10, 20_431),
        (100, 500, 100, 10_847),
        (100, 500, 50, 12_608),
        (100, 500, 10, 19_573),
    ],
)
def test_class_counts_are_the_published_ones(classes, largest, ratio, total):
    counts = datasets.long_tailed_counts(classes, largest, ratio)
    assert counts.sum() == total
    assert counts[0] == largest and counts[-1] == largest // ratio and (np.diff(counts) <= 0).all()


def test_the_long_tailed_draw_is_a_function_of_seed_and_sample_ids():
    train, _ = datasets.load(schema.Digits(name="digits"))
    first, again, other = (datasets.long_tailed(train, 20, None, seed) for seed in (3, 3, 4))
    assert first.class_counts.tolist() == datasets.long_tailed_counts(10, train.class_counts[0], 20).tolist()
    np.testing.assert_array_equal(first.sample_id, again.sample_id)
    assert not np.array_equal(first.sample_id, other.sample_id)
    # a larger ratio keeps a part of what a smaller one keeps, so sets of one seed are nested
    assert set(datasets.long_tailed(train, 50, None, 3).sample_id) < set(first.sample_id)
    shuffled = datasets.long_tailed(train.take(np.random.default_rng(0).permutation(len(train))), 20, None, 3)
    assert set(shuffled.sample_id) == set(first.sample_id)


def test_an_imbalanced_set_can_be_thinned_further_but_not_made_larger():
    train, _ = datasets.load(schema.Digits(name="digits", imbalance_ratio=20))
    assert len(datasets.long_tailed(train, 40, None, 0)) < len(train)
    with pytest.raises(UserError, match=r"ratio 10 asks for 106 samples of class '1', which has 98; lower data.max_per_class"):
        datasets.long_tailed(train, 10, None, 0)
    with pytest.raises(UserError, match=r"asks for 0 samples of class '7'.*raise data.max_per_class"):
        datasets.long_tailed(train, 1000, None, 0)


def test_digits_are_scikit_learns_with_a_balanced_test_part():
    from sklearn.datasets import load_digits

    train, test = datasets.load(schema.Digits(name="digits"))
    source = load_digits()
    assert test.class_counts.tolist() == [40] * 10 and len(train) + len(test) == len(source.target)
    assert not set(train.sample_id) & set(test.sample_id)
    pixels = np.asarray(train.decode(5))[..., 0] / 255 * 16
    np.testing.assert_allclose(pixels, source.images[train.sample_id[5]], atol=0.04)


def test_parquet_is_read_from_one_or_many_shards(tmp_path):
    parquet(tmp_path, [0, 1, 1], "train-0.parquet")
    parquet(tmp_path, [1, 0], "train-1.parquet", images=[png(3), png(4)])
    parquet(tmp_path, [0, 1], "test-0.parquet")
    train, test = datasets.load(section(tmp_path))
    assert train.classes == ("cat", "dog") and train.label.tolist() == [0, 1, 1, 1, 0] and len(test) == 2
    assert [np.asarray(train.decode(row))[0, 0, 0] for row in range(5)] == [0, 1, 2, 3, 4]
    assert train.image_size.tolist() == [[5, 6]] * 5
    assert train.fingerprint != test.fingerprint


def test_reading_parquet_does_not_wait_for_pandas(tmp_path):
    parquet(tmp_path, [0, 1])
    parquet(tmp_path, [0, 1], "test-0.parquet")
    script = f"""
import sys
from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data import datasets
datasets.load(schema.Parquet(name="parquet", root={str(tmp_path)!r}, train="train-*.parquet", test="test-*.parquet"))
print("pandas" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 2, -1]}, r"train|sample 1: label 2 is outside 0 … 1 \(2 such samples in the training part\)"),
        ({"labels": [0, 0, 0]}, r"1 classes have no training sample: 'dog'"),
        ({"labels": [0, None, 1]}, r"must hold whole numbers without gaps"),
        ({"labels": [0, 1], "images": [png(0), None]}, r"row 1 has no image bytes"),
        ({"labels": [0, 1], "column": "fine"}, r"has no column 'label' but image, fine"),
        ({"labels": []}, r"the training part holds no samples"),
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


def folder_of_images(root):
    for part in ("train", "test"):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for row in range(3):
                (root / part / name / f"{row}.png").write_bytes(png(row, (10 + row, 8)))
    return schema.ImageFolder(name="imagefolder", root=str(root))


def test_an_image_folder_has_a_class_for_each_folder(tmp_path):
    train, test = datasets.load(folder_of_images(tmp_path))
    assert train.classes == ("ant", "bee") and train.class_counts.tolist() == [3, 3] and len(test) == 6
    assert train.image_size.tolist() == [[8, 10], [8, 11], [8, 12]] * 2


def test_odd_images_are_decoded_upright_in_rgb_and_broken_ones_named(tmp_path):
    section = folder_of_images(tmp_path)
    ant = tmp_path / "train" / "ant"
    (ant / "0.jpg").write_bytes(png(0, (16, 8), "JPEG", "CMYK"))
    (ant / "1.jpg").write_bytes(png(0, (16, 8), "JPEG", "L"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (16, 8)).save(ant / "2.jpg", exif=exif)
    train, _ = datasets.load(section)
    sizes = dict(zip([Path(path).name for path in train.images], train.image_size.tolist()))
    assert (sizes["0.jpg"], sizes["1.jpg"], sizes["2.jpg"]) == ([8, 16], [8, 16], [16, 8])
    for row in range(len(train)):
        image = train.decode(row)
        assert image.mode == "RGB" and image.size[::-1] == tuple(train.image_size[row])
    whole = png(0, (64, 64), "JPEG")
    (ant / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (ant / "4.jpg").write_bytes(b"not an image")
    train, _ = datasets.load(section)
    with pytest.raises(UserError, match=r"3\.jpg cannot be read.*4\.jpg cannot be read.*: replace or remove them"):
        _ = train.image_size


def test_sixteen_bits_become_eight_and_the_size_of_a_turned_tiff_is_right(tmp_path):
    section = folder_of_images(tmp_path)
    ant = tmp_path / "train" / "ant"
    grey = (np.arange(256, dtype=np.uint16).reshape(16, 16)) * 257
    Image.fromarray(grey).save(ant / "0.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (16, 8)).save(ant / "1.tif", exif=exif)
    train, _ = datasets.load(section)
    rows = {Path(path).name: row for row, path in enumerate(train.images) if Path(path).parent == ant}
    np.testing.assert_array_equal(np.asarray(train.decode(rows["0.png"]))[..., 0].ravel(), np.arange(256))
    assert train.image_size[rows["1.tif"]].tolist() == [16, 8] == list(train.decode(rows["1.tif"]).size[::-1])
    Image.fromarray(grey.astype(np.float32)).save(ant / "2.tif")
    with pytest.raises(UserError, match="2.tif cannot be read as an image: it holds floating-point pixels"):
        _ = datasets.load(section)[0].image_size


def test_the_size_of_a_jpeg_is_that_of_its_first_picture_upright(tmp_path):
    section = folder_of_images(tmp_path)
    ant = tmp_path / "train" / "ant"
    picture = Image.new("RGB", (160, 80))
    picture.save(ant / "0.jpg", "MPO", save_all=True, append_images=[picture])  # as telephones write them
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(ant / f"turned{orientation}.jpg", exif=exif)
    train, _ = datasets.load(section)
    sizes = {Path(path).name: size for path, size in zip(train.images, train.image_size.tolist())}
    assert sizes["0.jpg"] == [80, 160]
    for orientation in range(10):
        assert sizes[f"turned{orientation}.jpg"] == ([160, 80] if 5 <= orientation <= 8 else [80, 160])
    assert [list(train.decode(row).size[::-1]) for row in range(len(train))] == train.image_size.tolist()


def test_class_names_that_cannot_be_told_apart_are_refused(tmp_path):
    parquet(tmp_path, [0, 1], "test-0.parquet", names=("cat", "cat"))
    parquet(tmp_path, [0, 1], "train-0.parquet", names=("cat", "cat"))
    with pytest.raises(UserError, match="class names must be distinct texts"):
        datasets.load(section(tmp_path))
    parquet(tmp_path, [0, 0], "test-0.parquet", names=("cat",))
    parquet(tmp_path, [0, 0], "train-0.parquet", names=("cat",))
    with pytest.raises(UserError, match="has 1 classes; there must be 2 to 100,000"):
        datasets.load(section(tmp_path))


def test_a_class_that_only_one_part_has_is_named(tmp_path):
    section = folder_of_images(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(UserError, match="differ in their classes: only one has 'cow'"):
        datasets.load(section)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no folder .*train; check data.root"):
        datasets.load(schema.ImageFolder(name="imagefolder", root=str(tmp_path)))


def test_a_class_whose_name_is_no_text_is_named(tmp_path):
    for part in "train", "test":
        for name in b"a", b"caf\xe9":
            folder = os.fsencode(tmp_path / part) + b"/" + name
            os.makedirs(folder)
            Image.new("RGB", (8, 8)).save(os.fsdecode(folder + b"/0.png"))
    with pytest.raises(UserError, match=r"the class name 'caf\\udce9' is not UTF-8; rename it"):
        datasets.load(schema.ImageFolder(name="imagefolder", root=str(tmp_path)))


def test_cifar_is_read_through_torchvision(tmp_path):
    """A small archive in CIFAR's own layout; its checksum is not the real one, which torchvision is told to accept."""
    import pickle

    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        batch = {"data": generator.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": [*range(10)] * 2}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, "_check_integrity", lambda self: True)
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
        train, test = datasets.load(schema.Cifar(name="cifar10", root=str(tmp_path)))
    assert train.classes == tuple(names) and train.class_counts.tolist() == [10] * 10 and len(test) == 20
    assert train.image_size[0].tolist() == [32, 32]


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(UserError, match="cannot load or download cifar100 into .*: no route"):
        datasets.load(schema.Cifar(name="cifar100", root=str(tmp_path)))


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("OFFLINE_BKD_DATA", raising=False)
    with pytest.raises(UserError, match="OFFLINE_BKD_DATA in .* is not set; set it, or give -o data.root=FOLDER"):
        datasets.load(schema.Digits(name="digits", root="${OFFLINE_BKD_DATA}/x"))


def test_the_fingerprint_tells_pixels_labels_and_choice_apart():
    train, _ = datasets.load(tiny.experiment().data)
    same = train.take(np.arange(len(train)))
    assert same.fingerprint == train.fingerprint
    changed = train.take(np.arange(len(train)))
    changed.images[0, 0, 0] ^= 1
    assert {k for k in train.fingerprint if changed.fingerprint[k] != train.fingerprint[k]} == {"images"}
    fewer = train.take(np.arange(1, len(train)))
    assert {k for k in train.fingerprint if fewer.fingerprint[k] == train.fingerprint[k]} == set()
