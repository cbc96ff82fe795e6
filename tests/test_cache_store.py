"""A store gives back what was written, says whose it is, and refuses what it is not for."""

import json
import subprocess
import sys

import numpy as np
import pytest
from cache_store import CLASSES, COUNTS, TWO_VIEWS, answers, arguments, dump, files, fill, identity

from offline_bkd.cache import CacheError, CropFlip, RandomResizedCrop, create_cache, format, open_cache

HALF = {"name": "probability", "dtype": "float16"}


def small_blocks(monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 100 * 5 * 4)  # 100 samples a block


# what is written is what is read


def test_float32_planes_come_back_exactly(tmp_path):
    cache = dump(tmp_path / "s")
    for view in range(18):
        plane = cache.plane(view)
        assert plane.dtype == np.float32 and (plane == answers(view)).all()
    assert cache.complete and cache.missing() == [] and cache.verify_checksums() == []


def test_float16_planes_are_within_half_a_step(tmp_path):
    cache = dump(tmp_path / "s", encoding=HALF)
    assert cache.stored_plane(2).dtype == np.float16 and cache.decoder is None
    np.testing.assert_allclose(cache.plane(2), answers(2), rtol=2**-11, atol=2**-25)


def test_blocks_cut_a_view_evenly_and_give_the_same_planes(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    with create_cache(tmp_path / "s", **arguments()) as writer:
        assert writer.blocks == 4
        assert [writer.rows(block) for block in range(4)] == [slice(i, i + 90) for i in (0, 90, 180, 270)]
        fill(writer)
    assert (open_cache(tmp_path / "s").plane(17) == answers(17)).all()


@pytest.mark.parametrize("samples, classes", [(1, 2), (7, 3), (115_846, 1000), (437_513, 8142), (50_000, 100)])
def test_blocks_hold_every_sample_once_and_fit_their_limits(samples, classes):
    names = tuple(str(c) for c in range(classes))
    encoding = create_encoding("float16")
    layout = format.Layout(identity=identity(classes=names), samples=samples, encoding=encoding, features={})
    rows = [layout.rows(block) for block in range(layout.blocks)]
    assert rows[0].start == 0 and rows[-1].stop == samples
    assert all(a.stop == b.start for a, b in zip(rows, rows[1:], strict=False)) and all(r.stop > r.start for r in rows)
    assert layout.block_rows * classes * 2 <= 8 << 20


def create_encoding(dtype):
    from offline_bkd.cache import encodings

    return encodings.from_json({"name": "probability", "dtype": dtype})


def test_columns_and_identity_come_back(tmp_path):
    given, cache = arguments(), dump(tmp_path / "s")
    assert (cache.sample_id == given["sample_id"]).all() and (cache.label == given["label"]).all()
    assert (cache.image_size == given["image_size"]).all()
    assert cache.class_counts.tolist() == list(COUNTS) and len(cache) == 360
    assert cache.identity == identity() and cache.classes == CLASSES
    assert cache.temperature == 2.0 and cache.views == CropFlip(pad=1)


def test_rows_gathers_pairs_in_the_order_asked(tmp_path):
    cache = dump(tmp_path / "s")
    samples, views = np.array([5, 359, 5, 0]), np.array([3, 17, 0, 3])
    expected = np.stack([answers(view)[sample] for sample, view in zip(samples, views, strict=False)])
    assert (cache.rows(samples, views) == expected).all()


def test_a_plane_is_read_into_a_given_array(tmp_path):
    cache = dump(tmp_path / "s")
    out = np.zeros((360, 5), np.float32)
    assert cache.stored_plane(4, out=out) is out and (out == answers(4)).all()
    with pytest.raises(ValueError, match=r"out must be float32 \[360, 5\], contiguous, found float64"):
        cache.stored_plane(4, out=np.zeros((360, 5)))


def test_the_same_dump_gives_the_same_bytes(tmp_path):
    dump(tmp_path / "a"), dump(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_bytes_on_disk_are_format_1(tmp_path):
    dump(tmp_path / "s")
    found = files(tmp_path / "s")
    assert {key for key in found if key.startswith("probability")} == {
        "probability/zarr.json", *(f"probability/c.{view}.0.0" for view in range(18))
    }  # fmt: skip
    chunk = found["probability/c.3.0.0"]
    assert chunk[:-4] == answers(3).astype("<f4").tobytes()
    marker = json.loads(found["done/3.0"])
    assert marker["view"] == 3 and marker["rows"] == [0, 360]
    assert marker["files"] == {"probability/c.3.0.0": {"size": len(chunk), "checksum": chunk[-4:].hex()}}
    attributes = json.loads(found["zarr.json"])["attributes"]
    assert attributes["cache_format"] == 1 and attributes["encoding"] == {"name": "probability", "dtype": "float32"}
    array = json.loads(found["probability/zarr.json"])
    assert array["dimension_names"] == ["view", "sample", "class"] and array["codecs"][-1] == {"name": "crc32c"}


def test_bytes_counts_every_committed_file(tmp_path):
    cache = dump(tmp_path / "s")
    uncounted = {"probability/c.0.0.0"}
    assert cache.nbytes == sum(map(len, files(tmp_path / "s").values()))
    (tmp_path / "s/done/0.0").unlink()
    found = files(tmp_path / "s")
    assert cache.nbytes == sum(len(data) for key, data in found.items() if key not in uncounted)


# what is not there yet


def test_an_unfinished_store_says_what_is_missing_and_resumes(tmp_path, monkeypatch):
    small_blocks(monkeypatch)
    with create_cache(tmp_path / "s", **arguments()) as writer:
        fill(writer, [(0, 0), (0, 1), (0, 2), (0, 3), (2, 1)])
    cache = open_cache(tmp_path / "s")
    assert not cache.complete and len(cache.missing()) == 72 - 5 and (2, 1) not in cache.missing()
    assert (cache.plane(0) == answers(0)).all()
    with pytest.raises(CacheError, match=r"probability, view 2, rows 0 to 89 is not dumped yet; resume the dump"):
        cache.plane(2)
    with create_cache(tmp_path / "s", resume=True, **arguments()) as writer:
        assert writer.pending() == cache.missing()
        fill(writer)
    assert cache.complete
    dump(tmp_path / "twin")
    assert files(tmp_path / "s") == files(tmp_path / "twin")


def test_resuming_where_nothing_is_creates(tmp_path):
    with create_cache(tmp_path / "s", resume=True, **arguments()) as writer:
        assert len(writer.pending()) == 18


# refusals


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    dump(tmp_path / "s")
    with pytest.raises(CacheError, match=r"is not empty; resume the dump \(--resume\) or name another folder \(--out\)"):
        create_cache(tmp_path / "s", **arguments())


def test_resuming_in_a_folder_of_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CacheError, match="is not a store: it holds thesis.tex; choose another folder"):
        create_cache(tmp_path, resume=True, **arguments())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 4.0}, "temperature: the store has 2.0, the run has 4.0"),
        ({"views": CropFlip(pad=1, flip=False)}, "views.flip: the store has True, the run has False"),
        ({"views": RandomResizedCrop(size=8, count=18)}, "views.name: the store has crop_flip, the run has random_re"),
        ({"teacher": {"digest": "dd"}}, "teacher.digest: the store has cc, the run has dd"),
        (
            {"dataset": {"name": "fruit", "digests": {"labels": "zz", "images": "bb"}}},
            "dataset.digests.labels: the store has aa, the run has zz",
        ),
        (
            {"classes": ("apple", "baby", "aquarium fish", "bear", "beaver")},
            "classes: class 1 is 'aquarium fish' in the store and 'baby' in the run",
        ),
        ({"classes": (*CLASSES, "bee")}, "classes: the store has 5, the run has 6"),
    ],
)
def test_resuming_another_identity_names_the_difference(tmp_path, change, message):
    create_cache(tmp_path / "s", **arguments()).close()
    with pytest.raises(CacheError, match=message):
        create_cache(tmp_path / "s", resume=True, **arguments(identity=identity(**change)))


COMPUTED = {"precision": "float32", "device": "cpu", "environment": {"torch": "2.9", "decoder": "Pillow 11"}}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"precision": "bfloat16"}, "precision: the store has float32, the run has bfloat16; choose another folder"),
        ({"device": "cuda"}, "device: the store has cpu, the run has cuda; choose another folder"),
        ({"scaling": 2}, "scaling: the store has None, the run has 2; choose another folder"),
    ],
)
def test_answers_computed_otherwise_are_not_mixed_into_a_store(tmp_path, change, message):
    with create_cache(tmp_path / "s", **arguments(identity=identity(computed=COMPUTED))) as writer:
        fill(writer, [(0, 0)])
    before = files(tmp_path / "s")
    with pytest.raises(CacheError, match=f"s is another store: {message}"):
        create_cache(tmp_path / "s", resume=True, **arguments(identity=identity(computed={**COMPUTED, **change})))
    assert files(tmp_path / "s") == before


def test_answers_that_differ_in_their_last_bits_are_noted(tmp_path):
    create_cache(tmp_path / "s", **arguments(identity=identity(computed=COMPUTED))).close()
    later = {**COMPUTED, "environment": {"torch": "2.10", "decoder": "Pillow 11"}}
    given = arguments(identity=identity(computed=later))
    with create_cache(tmp_path / "s", resume=True, **given) as writer:
        assert writer.notes == ["environment.torch: the store has 2.9, the run has 2.10"]
        fill(writer)
    assert open_cache(tmp_path / "s").identity.computed == COMPUTED, "what it was begun with"
    with create_cache(tmp_path / "s", resume=True, **given) as writer:
        assert writer.notes == [], "nothing is left to compute"


def test_a_processor_is_one_device_whatever_its_threads_and_as_earlier_versions_called_it(tmp_path):
    def computed(device: str) -> dict:
        return {**COMPUTED, "environment": {"device": device}}

    create_cache(tmp_path / "s", **arguments(identity=identity(computed=computed("cpu (2 cores)")))).close()
    for device, notes in {
        "cpu (1 thread)": [],
        "cpu (8 threads)": [],
        "NVIDIA L4": ["environment.device: the store has cpu (2 cores), the run has NVIDIA L4"],
    }.items():
        with create_cache(tmp_path / "s", resume=True, **arguments(identity=identity(computed=computed(device)))) as writer:
            assert writer.notes == notes


def test_a_store_that_does_not_say_how_it_was_computed_is_read_and_resumed(tmp_path):
    create_cache(tmp_path / "s", **arguments()).close()
    assert "computed" not in json.loads((tmp_path / "s/zarr.json").read_text())["attributes"]["identity"]
    given = arguments(identity=identity(computed=COMPUTED))
    with create_cache(tmp_path / "s", resume=True, **given) as writer:
        assert writer.notes == ["the store does not say how its answers were computed"]
    with create_cache(tmp_path / "s", resume=True, **arguments()) as writer:
        assert writer.notes == []
    assert identity(computed=COMPUTED).differences(identity()) == [], "a student does not ask"


def test_the_teachers_digest_alone_says_whether_it_is_the_same():
    assert identity().differences(identity(teacher={"digest": "cc", "architecture": "resnet32"})) == []
    assert identity().differences(identity()) == []


def test_digests_that_differ_are_named_by_their_first_digits():
    ours, theirs = identity(teacher={"digest": "0123456789abcdef" * 4}), identity(teacher={"digest": "f" * 64})
    assert ours.differences(theirs) == ["teacher.digest: the store has 0123456789ab, the run has ffffffffffff"]


def test_resuming_other_samples_or_another_encoding_names_the_difference(tmp_path):
    create_cache(tmp_path / "s", **arguments()).close()
    given = arguments()
    label = given["label"].copy()
    label[7] = (label[7] + 1) % 5
    for change, message in [
        ({"sample_id": given["sample_id"] + 1}, "sample_id: row 0 is 3 in the store and 4 in the run"),
        ({"label": label}, f"label: row 7 is {given['label'][7]} in the store and {label[7]} in the run"),
        ({"image_size": given["image_size"] + 1}, "image_size: row 0 is .8 8. in the store and .9 9. in the run"),
        ({key: given[key][:-1] for key in ("sample_id", "label", "image_size")}, "the store has 360, the run has 359"),
        ({"encoding": HALF}, "encoding.dtype: the store has float32, the run has float16"),
    ]:
        with pytest.raises(CacheError, match=message):
            create_cache(tmp_path / "s", resume=True, **{**given, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sample_id": np.arange(360) - 1}, r"sample_id must be in \[0, 2\^32\), found -1 to 358"),
        ({"sample_id": np.arange(360) + 2**32}, r"sample_id must be in \[0, 2\^32\), found 4294967296 to"),
        ({"sample_id": np.zeros(360, int)}, "sample_id must be distinct, found 360 of which some are equal"),
        ({"sample_id": [], "label": [], "image_size": np.empty((0, 2))}, "a cache is of samples; found none"),
        ({"label": [0]}, r"label must be \[360\] and image_size \[360, 2\], found \[1\] and \[360, 2\]"),
        ({"label": np.full(360, 5)}, r"label must be in \[0, 5\), found 5 to 5"),
        ({"label": np.full(360, 1.7)}, "a label is a whole number, found array"),
        ({"label": np.full(360, True)}, "a label is a whole number, found array"),
        ({"image_size": np.full((360, 2), 8.5)}, "a side of an image is a whole number, found array"),
        ({"image_size": np.full((360, 2), -8)}, "image_size must not be negative, found -8"),
        ({"sample_id": np.arange(360, dtype=np.uint64) + 2**63}, "a sample_id is below 2"),
        ({"encoding": {"name": "top-k"}}, "encoding.name must be one of logit, probability, klt"),
        ({"encoding": {"name": "probability", "dtype": "int8"}}, "dtype must be float16 or float32, found 'int8'"),
        ({"encoding": {"name": "probability", "bits": 3}}, "encoding probability does not take bits; it takes dtype"),
        ({"identity": identity(classes=("a", "a"))}, "classes must be distinct names"),
        ({"identity": identity(classes=("a",))}, "there must be 2 to 100000 classes, found 1"),
        ({"identity": identity(temperature=0.0)}, "temperature must be a positive number, found 0.0"),
        ({"identity": identity(dataset=None)}, "dataset, teacher and computed must be JSON objects"),
        ({"identity": identity(computed=[1])}, "dataset, teacher and computed must be JSON objects"),
        ({"identity": identity(teacher={})}, "teacher must have a digest"),
        ({"identity": identity(views=CropFlip(pad=1.5))}, "there must be 1 to 1000000 views, found 32.0"),
    ],
)  # fmt: skip
def test_arguments_that_make_no_store_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        create_cache(tmp_path / "s", **arguments(**change))
    assert not (tmp_path / "s").exists()


def broken(value, where=(40, 2)):
    probability = answers(0).copy()
    probability[where] = value
    return probability


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.5, 1.5])
def test_a_row_that_is_no_distribution_is_named_and_not_written(tmp_path, value):
    with create_cache(tmp_path / "s", **arguments()) as writer:
        with pytest.raises(ValueError, match=r"sample 283, view 0: not a distribution .* mend the teacher's output"):
            writer.write(0, 0, broken(value))
        assert (0, 0) in writer.pending()


def test_logits_and_wrong_shapes_are_refused(tmp_path):
    with create_cache(tmp_path / "s", **arguments()) as writer:
        with pytest.raises(ValueError, match="sample 3, view 1: not a distribution"):
            writer.write(1, 0, np.log(answers(1)))
        with pytest.raises(ValueError, match=r"block 0 takes probability \[360, 5\], found \[359, 5\]"):
            writer.write(1, 0, answers(1)[1:])


def test_blocks_may_be_numpys_numbers(tmp_path, two_blocks):
    with create_cache(tmp_path / "s", joint=True, **arguments(**TWO_VIEWS)) as writer:
        writer.take([tuple(pair) for pair in np.argwhere(np.ones((2, 2)))])
        fill(writer)
    dump(tmp_path / "whole", **TWO_VIEWS)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_views_that_are_not_there_are_refused(tmp_path):
    cache = dump(tmp_path / "s")
    for view in -1, 18:
        with pytest.raises(CacheError, match=f"there is no view {view}: the store has views 0 to 17"):
            cache.plane(view)


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(CacheError, match="is not a store: it is empty, or not there"):
        open_cache(tmp_path / "nothing")
    (tmp_path / "a").write_text("hello")
    with pytest.raises(CacheError, match="is not a store: it has no zarr.json"):
        open_cache(tmp_path)
    for name in ("b.zarr", "a.zarr"):
        (tmp_path / name).mkdir()
    with pytest.raises(
        CacheError, match=f"{tmp_path} is not a store, but a folder that holds a.zarr, b.zarr; name one of them"
    ):
        open_cache(tmp_path)


# the package


def test_the_package_needs_neither_torch_nor_the_pipeline_and_opens_without_pandas(checkout):
    script = (
        "import sys\n"
        "for name in 'torch', 'torchvision', 'offline_bkd.pipeline', 'pandas', 'pyarrow', 'fsspec', 'obstore':\n"
        "    sys.modules[name] = None\n"
        "from offline_bkd.cache import encodings, format, frame, reader, storage, writer\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=checkout)


def test_the_table_needs_no_torch(tmp_path, checkout):
    dump(tmp_path / "s")
    script = (
        "import sys\nfor name in 'torch', 'torchvision', 'offline_bkd.pipeline': sys.modules[name] = None\n"
        f"from offline_bkd import open_cache\nassert len(open_cache({str(tmp_path / 's')!r}).to_pandas(view=3)) == 360\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env=checkout)
