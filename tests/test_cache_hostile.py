"""A store made to do harm is refused before it allocates or runs anything. Its author can make checksums match."""

import json
import os
import tracemalloc

import google_crc32c
import numpy as np
import pytest
from cache_store import answers, arguments, dump, identity

from offline_bkd.cache import CacheError, CorruptCacheError, CropFlip, RandomResizedCrop, create_cache, format, open_cache
from offline_bkd.cache.encodings import Dense


@pytest.fixture
def url(tmp_path):
    dump(tmp_path / "s", identity=identity(views=CropFlip(pad=0)))
    return tmp_path / "s"


def edit(url, key, change):
    """Change the JSON document `key`, and make the store's marker agree with it."""
    document = json.loads((url / key).read_text())
    change(document)
    replace(url, key, format.to_bytes(document))


def replace(url, key, data):
    (url / key).write_bytes(data)
    files = json.loads((url / "done/store").read_text())["files"]
    files[key] = {"size": len(data), "checksum": format.digest(data)}
    (url / "done/store").write_bytes(format.marker(files))


def refused(url, message):
    tracemalloc.start()
    try:
        with pytest.raises(CacheError, match=message) as caught:
            open_cache(url).plane(0)
        assert str(url) in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_the_editing_itself_is_not_what_is_refused(url):
    edit(url, "zarr.json", lambda document: None)
    edit(url, "probability/zarr.json", lambda document: None)
    assert open_cache(url).plane(0).shape == (360, 5)


@pytest.mark.parametrize(
    "field, value",
    [
        ("shape", [2, 10**15, 5]),
        ("shape", [2, -1, 5]),
        ("shape", [10**400]),
        ("data_type", "object"),
        ("data_type", {"name": "structured", "configuration": {"fields": []}}),
        ("fill_value", 0),
        ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [1, 1, 1]}}),
        ("chunk_key_encoding", {"name": "default", "configuration": {"separator": "/../../"}}),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "little"}}]),
        ("codecs", [{"name": "numcodecs.pickle"}]),
        ("codecs", [{"name": "pickle"}, {"name": "crc32c"}]),
        ("storage_transformers", [{"name": "exec"}]),
        ("node_type", "group"),
        ("must_understand", True),
    ],
)
def test_array_metadata_that_differ_from_the_format_are_refused(url, field, value):
    edit(url, "probability/zarr.json", lambda document: document.__setitem__(field, value))
    refused(url, "probability/zarr.json is not what format 1 says; dump one with the command dump-logits")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["cache_format"], 2, "has format 2, this version reads 1; use the version that wrote it, or dump it again"),
        (["cache_format"], {"a": []}, "has format {'a': ..}, this version reads 1"),
        (["identity"], None, "identity is not readable"),
        (["identity", "classes"], 7, "identity is not readable"),
        (["identity", "classes"], ["a"] * 5, "identity is not readable: classes must be distinct names"),
        (["identity", "classes"], [["../../etc"]], "identity is not readable: classes must be distinct names"),
        (["identity", "classes"], [str(c) for c in range(100_001)], "there must be 2 to 100000 classes, found 100001"),
        (["identity", "classes"], ["a", "b", "c"], "zarr.json is not what format 1 says"),
        (["identity", "temperature"], "2", "temperature must be a positive number, found '2'"),
        (["identity", "temperature"], 10**400, "temperature must be a positive number, found 1000"),
        (["identity", "temperature"], True, "temperature must be a positive number, found True"),
        (["identity", "views"], {"name": "os.system"}, "unknown view specification"),
        (["identity", "views", "pad"], 10**9, "identity is not readable"),
        (["identity", "views", "pad"], "x", "identity is not readable"),
        (["identity", "views"], {"name": "random_resized_crop", "size": 1, "count": 10**12}, "there must be 1 to 1000"),
        (["identity", "views"], {"name": "random_resized_crop", "size": 1, "count": 2, "scale": []}, "not readable"),
        (["identity", "teacher"], [], "dataset, teacher and computed must be JSON objects"),
        (["encoding"], {"name": "pickle"}, "has an encoding that this version does not read"),
        (["encoding"], "probability", "has an encoding that this version does not read"),
        (["encoding", "dtype"], "object", "encoding.dtype must be float16 or float32, found 'object'"),
        (["encoding", "dtype"], ["float16"], "encoding.dtype must be float16 or float32"),
        (["encoding", "dtype"], "float16", "probability/zarr.json is not what format 1 says"),
    ],
)
def test_attributes_that_make_no_sense_are_refused(url, path, value, message):
    def change(document):
        at = document["attributes"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    edit(url, "zarr.json", change)
    refused(url, message)


def test_a_foreign_group_is_refused(url):
    edit(url, "zarr.json", lambda document: document.__setitem__("attributes", {"cache_format": 1}))
    refused(url, "is not a store: its attributes are .'cache_format'.")
    for change in lambda document: document.__setitem__("attributes", {}), lambda document: document.clear():
        edit(url, "zarr.json", change)
        refused(url, "zarr.json has lost the store's attributes to another program; restore that file from a copy")
    (url / "done/store").unlink()
    refused(url, "is not a store: its zarr.json has no cache_format")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"[1]", b"{", b"[" * 100_000, b'{"a": 1e999999}'])
def test_documents_that_are_no_json_objects_are_refused(url, data):
    (url / "zarr.json").write_bytes(data)
    refused(url, "zarr.json")


def test_a_document_too_large_to_be_one_is_refused_unread(url):
    os.truncate(url / "zarr.json", 1 << 40)
    refused(url, "is not a store: zarr.json has 1099511627776 bytes")


def test_more_samples_than_the_file_of_ids_has_are_refused(url):
    shapes = {"sample_id": [10**12], "label": [10**12], "image_size": [10**12, 2], "probability": [2, 10**12, 5]}
    for name, shape in shapes.items():
        edit(url, f"{name}/zarr.json", lambda document, shape=shape: document.__setitem__("shape", shape))
    refused(url, "sample_id/zarr.json is not what format 1 says")
    os.truncate(url / "sample_id/c.0", 1 << 40)
    refused(url, "sample_id is damaged: it has 1099511627776 bytes")


def test_files_that_are_longer_than_they_may_be_are_refused_unread(url, tmp_path):
    os.truncate(url / "label/c.0", 1 << 40)
    refused(url, "label/c.0 is damaged: it has 1099511627776 bytes of 2884")
    for name, encoding in ("plain", "logit"), ("coded", "klt"):
        given = {"encoding": {"name": encoding}, "fit": lambda views: np.stack([answers(view) for view in views])}
        dump(tmp_path / name, identity=identity(views=CropFlip(pad=0)), **given)
    os.truncate(tmp_path / "plain/logit/c.0.0.0", 1 << 40)
    refused(tmp_path / "plain", "is damaged: it has 1099511627776 bytes of 3604")
    os.truncate(tmp_path / "coded/code/c.0.0.0", 1 << 40)
    refused(tmp_path / "coded", "is damaged: it has")
    os.truncate(tmp_path / "plain/done/0.0", 1 << 40)
    tracemalloc.start()
    with pytest.raises(CacheError, match="the marker done/0.0 of .* is damaged"):
        open_cache(tmp_path / "plain").survey()
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def replace_column(url, key, values):
    import google_crc32c

    data = np.asarray(values, "<i8").tobytes()
    data += google_crc32c.value(data).to_bytes(4, "little")
    (url / key).write_bytes(data)
    files = json.loads((url / "done/store").read_text())["files"]
    files[key] = {"size": len(data), "checksum": data[-4:].hex()}
    (url / "done/store").write_bytes(format.marker(files))


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("label/c.0", np.full(360, 7), r"label must be in \[0, 5\), found 7 to 7"),
        ("sample_id/c.0", np.full(360, 5), "sample_id must be distinct"),
        ("sample_id/c.0", np.arange(360) - 5, r"sample_id must be in \[0, 2\^32\), found -5 to 354"),
        ("sample_id/c.0", np.arange(360) + 2**32 - 1, r"sample_id must be in \[0, 2\^32\), found 4294967295"),
        ("image_size/c.0.0", np.full((360, 2), -3), "image_size must not be negative, found -3"),
    ],
)
def test_columns_that_no_writer_writes_are_refused(url, key, values, message):
    replace_column(url, key, values)
    refused(url, f"is not usable: {message}.*; dump it again")


@pytest.mark.parametrize("count", [0, 359, 361])
def test_more_or_fewer_labels_than_samples_are_refused(url, count):
    replace_column(url, "label/c.0", np.zeros(count))
    refused(url, f"label/c.0 is damaged: it has {8 * count + 4} bytes of 2884")


@pytest.mark.parametrize("files", [None, [], {"zarr.json": 3}, {"zarr.json": {"size": -1}}])
def test_markers_that_make_no_sense_are_refused(url, files):
    (url / "done/store").write_bytes(format.marker(files))
    refused(url, "done/store|zarr.json")


def test_what_a_store_claims_to_be_costs_nothing_only_what_is_there(tmp_path):
    classes, samples = 5000, 100
    given = arguments(
        identity=identity(classes=tuple(map(str, range(classes))), views=RandomResizedCrop(size=8, count=10**6)),
        **{name: np.arange(samples) for name in ("sample_id", "label")},
        image_size=np.full((samples, 2), 8),
        encoding={"name": "logit"},
    )
    with create_cache(tmp_path / "s", **given) as writer:
        writer.write(5, 0, np.full((writer.rows(0).stop, classes), 1 / classes, np.float32))
    tracemalloc.start()
    try:
        cache = open_cache(tmp_path / "s")
        summary = cache.summary(planes=1)
        assert summary["blocks"] == {"done": 1, "all": 10**6, "of_a_view": 1} and not cache.complete
        assert cache.verify_checksums() == [] and cache.committed() == [(5, 0)]
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()


def test_a_store_that_claims_more_blocks_than_can_be_listed_is_refused():
    count = 10**6
    with pytest.raises(CacheError, match="a store has at most 10,000,000 blocks, 1,000,000 views of 1,000,000 samples and"):
        format.Layout(
            identity=identity(classes=tuple(map(str, range(1000))), views=RandomResizedCrop(size=8, count=count)),
            samples=count,
            encoding=Dense(name="logit"),
            features={},
        )


def put_chunk(url, view, values):
    """Writes a block of `url`, a store of two views of one block, as its own writer would, but without looking at it."""
    path = url / f"{open_cache(url).encoding.array}/c.{view}.0.0"
    data = np.ascontiguousarray(values).tobytes()
    path.write_bytes(data + google_crc32c.value(data).to_bytes(4, "little"))
    marker = json.loads((url / f"done/{view}.0").read_text())
    files = {str(path.relative_to(url)): {"size": len(data) + 4, "checksum": path.read_bytes()[-4:].hex()}}
    owner = {key: marker[key] for key in ("store", "view", "rows")}
    (url / f"done/{view}.0").write_bytes(format.marker(files, **owner))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("wrong", [lambda p: 3 * p, lambda p: np.where(p == p[70].min(), np.nan, p), lambda p: p - 0.1])
def test_probabilities_that_are_no_distributions_are_refused(tmp_path, dtype, wrong):
    url, given = tmp_path / "s", {"encoding": {"name": "probability", "dtype": dtype}}
    dump(url, identity=identity(views=CropFlip(pad=0)), **given)
    put_chunk(url, 1, answers(1).astype(dtype))
    assert open_cache(url).verify_checksums() == [], "the editing itself is not what is refused"
    put_chunk(url, 1, wrong(answers(1)).astype(dtype))
    (problem,) = open_cache(url).verify_checksums()
    assert "view 1, rows 0 to 359 is not usable: sample" in problem and "has no distribution" in problem


@pytest.mark.parametrize("bits", [0x7C00, 0x7E00, 0xFE00, 0x3C00, "all -inf"])
def test_logits_that_are_no_logits_are_refused(tmp_path, bits):
    url = tmp_path / "s"
    cache = dump(url, identity=identity(views=CropFlip(pad=0)), encoding={"name": "logit"})
    stored = cache.stored_plane(0)
    stored[7, 1] = -np.inf  # which stands for nothing at all
    put_chunk(url, 0, stored)
    assert open_cache(url).verify_checksums() == []
    if bits == "all -inf":
        stored[70] = -np.inf
    else:
        stored.view(np.uint16)[70, 2] = bits
    put_chunk(url, 0, stored)  # a row that no reading looks at, but verifying does
    (problem,) = open_cache(url).verify_checksums()
    assert "sample 493 has no distribution (logits from" in problem
    stored[0] = stored[70]
    put_chunk(url, 0, stored)
    with pytest.raises(CorruptCacheError, match=r"sample 3 has no distribution \(logits from .*; delete its marker done/0.0"):
        open_cache(url).plane(0)


def test_a_codebook_of_no_numbers_is_refused(tmp_path):
    fit = {"fit": lambda views: np.stack([answers(view) for view in views])}
    url = tmp_path / "s"
    dump(url, identity=identity(views=CropFlip(pad=0)), encoding={"name": "klt"}, **fit)
    key = "codebook/mean/c.0"
    data = np.full(5, np.nan, np.float32).tobytes()
    data += google_crc32c.value(data).to_bytes(4, "little")
    files = json.loads((url / "done/store").read_text())["files"]
    assert files[key]["size"] == len(data)
    (url / key).write_bytes(data)
    files[key]["checksum"] = data[-4:].hex()
    (url / "done/store").write_bytes(format.marker(files))
    refused(url, "is not usable: codebook/mean holds numbers that are not finite")


@pytest.mark.parametrize("member", [3, {"digest": 4}, {"name": "a teacher"}])
def test_teachers_of_an_average_that_say_not_who_they_are_are_refused(url, member):
    edit(url, "zarr.json", lambda document: document["attributes"]["identity"]["teacher"].__setitem__("average_of", [member]))
    refused(url, "the store's identity is not readable: a teacher must have a digest")


@pytest.mark.parametrize("stated", [{"mean": -1, "worst": 0}, {"mean": 0.1, "worst": 10**400}, {"mean": "0", "worst": 0}, 3])
def test_a_marker_whose_error_is_no_error_is_refused(tmp_path, stated):
    fit = {"fit": lambda views: np.stack([answers(view) for view in views])}
    cache = dump(tmp_path / "s", identity=identity(views=CropFlip(pad=0)), encoding={"name": "klt"}, **fit)
    path = tmp_path / "s/done/1.0"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    path.write_bytes(format.marker(**values | {"error": stated}))
    with pytest.raises(CacheError, match="is not usable: its markers do not say what was lost"):
        cache.survey()


def test_what_is_no_name_of_a_block_is_passed_over(url):
    for name in "x", "0", "0.0.0", "00.0", "0.00", "-1.0", "2.0", "0.1", "9" * 30 + ".0", "0.0 ", "٣.0":
        (url / "done" / name).write_text("")
    cache = open_cache(url)
    assert cache.committed() == [(0, 0), (1, 0)] and cache.complete


@pytest.mark.parametrize("name", [["x"], {"a": 1}, 7, None])
def test_an_encoding_whose_name_is_no_name_is_refused(url, name):
    edit(url, "zarr.json", lambda document: document["attributes"]["encoding"].__setitem__("name", name))
    refused(url, "has an encoding that this version does not read: encoding.name must be one of")
