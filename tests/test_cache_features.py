"""Features: a teacher's vectors beside its probabilities, as directions in eight bits with a checked error."""

import json

import numpy as np
import pytest
from cache_store import answers, arguments, files, flips, identity, problems

from offline_bkd.cache import CacheError, CorruptCacheError, CropFlip, create_cache, features, format, open_cache

WIDTHS = {"resnet8": 64, "vit-tiny_2": 7}
TWO_VIEWS = identity(views=CropFlip(pad=0))
GIVEN = arguments(identity=TWO_VIEWS, features=WIDTHS)


def vectors(name, view, count=360):
    """A teacher's features, float32 [N, D], of no particular length."""
    rng = np.random.default_rng(view + 100)
    return (rng.normal(size=(count, WIDTHS[name])) * rng.lognormal(0, 4, (count, 1))).astype(np.float32)


def both(view, rows=slice(None)):
    return {name: vectors(name, view)[rows] for name in WIDTHS}


def fill(writer, blocks=None):
    for view, block in writer.pending() if blocks is None else blocks:
        rows = writer.rows(block)
        writer.write(view, block, answers(view)[rows], both(view, rows))


def dump(url, **changes):
    with create_cache(url, **GIVEN | changes) as writer:
        fill(writer)
    return open_cache(url)


def distance(exact, found):
    """Cosine distances in float64, [N]."""
    exact, found = exact.astype(np.float64), found.astype(np.float64)
    return 1 - (exact * found).sum(1) / np.linalg.norm(exact, axis=1) / np.linalg.norm(found, axis=1)


@pytest.fixture
def three_blocks(monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 120 * 64)


@pytest.mark.parametrize("encoding", ["probability", "logit", "klt"])
@pytest.mark.parametrize("place", ["folder", "memory"])
def test_resuming_writes_again_what_has_lost_a_file_or_the_end_of_one(tmp_path, three_blocks, encoding, place):
    fit = {"fit": lambda views: np.stack([answers(view) for view in views])}
    url = tmp_path / "s" if place == "folder" else f"memory://{tmp_path.name}"
    array = {"klt": "code"}.get(encoding, encoding)
    place = dump(url, encoding={"name": encoding}, **fit)._storage
    whole = {key: bytes(place.read(key)) for key in place.keys() if key != "done/lock"}
    for name in array, "feature/resnet8", "feature/vit-tiny_2":
        for view, left in (1, None), (1, 0), (1, -1), (0, -1):
            key = f"{name}/c.{view}.1.0"
            place.remove(key)
            if left is not None:
                place.write(key, whole[key][:left])
            again = [(0, 1), (1, 1)] if encoding == "klt" and view == 0 else [(view, 1)]  # views are differences from view 0
            assert open_cache(url).lost() == [(view, 1)] and sorted(sum(open_cache(url).parts(2), [])) == again
            with create_cache(url, **GIVEN | {"encoding": {"name": encoding}}, **fit, resume=True) as writer:
                assert writer.lost == 1 and sorted(writer.pending()) == again
                fill(writer)
            assert {key: bytes(place.read(key)) for key in place.keys() if key != "done/lock"} == whole
    assert open_cache(url).lost() == []


@pytest.mark.parametrize("encoding", ["probability", "klt"])
def test_directions_come_back_and_their_error_is_stated(tmp_path, three_blocks, encoding):
    fit = {"fit": lambda views: np.stack([answers(view) for view in views])}
    cache = dump(tmp_path / "s", encoding={"name": encoding}, **fit)
    assert cache.features == WIDTHS and cache.complete and cache.verify_checksums() == []
    for name, width in WIDTHS.items():
        errors = []
        for view in range(2):
            plane = cache.feature_plane(name, view)
            assert plane.dtype == np.float32 and plane.shape == (360, width)
            np.testing.assert_allclose(np.linalg.norm(plane, axis=1), 1, rtol=1e-6)
            errors.append(distance(vectors(name, view), plane))
        stated = cache.summary()["features"][name]
        assert stated["width"] == width and stated["error"]["bound"] == 0.01
        assert stated["error"]["mean"] == pytest.approx(np.mean(errors), rel=1e-3)
        assert stated["error"]["worst"] == pytest.approx(np.max(errors), rel=1e-3) and np.max(errors) < 1e-3


def test_what_is_stored_is_bytes_that_any_reader_of_zarr_opens(tmp_path, three_blocks):
    import zarr

    cache = dump(tmp_path / "s")
    array = zarr.open_array(tmp_path / "s/feature/resnet8", mode="r")
    assert array.shape == (2, 360, 64) and array.chunks == (1, 120, 64) and array.dtype == np.int8
    stored = cache.stored_feature_plane("resnet8", 1)
    assert (array[1] == stored).all() and (np.abs(stored).max(1) == 127).all()
    exact = vectors("resnet8", 1)
    assert np.abs(stored - exact * (127 / np.abs(exact).max(1, keepdims=True))).max() <= 0.501
    out = np.empty_like(stored)
    assert cache.stored_feature_plane("resnet8", 1, out) is out and (out == stored).all()


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-20, 1, 2.0**120])
def test_vectors_of_any_length(scale):
    exact = np.random.default_rng(0).uniform(-2, 2, (360, 64)).astype(np.float32)
    codes, error = features.encode(exact * np.float32(scale))
    assert (codes == features.encode(exact)[0]).all() and error["worst"] < 1e-4


def test_one_component_that_outweighs_all_others_by_far_is_refused(tmp_path):
    loud = np.full((360, 4096), 0.0038, np.float32)
    loud[:, 0] = 1
    with create_cache(tmp_path / "s", **GIVEN | {"features": {"loud": 4096}}) as writer:
        message = r"view 0, rows 0 to 359: the mean cosine distance is 0.0\d+, above 0.01: .*; standardise the features"
        with pytest.raises(CacheError, match=message):
            writer.write(0, 0, answers(0), {"loud": loud})
        assert (0, 0) in writer.pending()


@pytest.mark.parametrize("value", [0, np.nan, np.inf, -np.inf])
def test_a_vector_without_direction_is_named_and_nothing_is_written(tmp_path, value):
    given = both(0)
    given["resnet8"][40] = value
    with create_cache(tmp_path / "s", **GIVEN) as writer:
        before = files(tmp_path / "s")
        message = "sample 283, view 0: features resnet8 have no direction .* mend the teacher's output"
        with pytest.raises(ValueError, match=message):
            writer.write(0, 0, answers(0), given)
        assert files(tmp_path / "s") == before and (0, 0) in writer.pending()


@pytest.mark.parametrize("given", [None, {"resnet8": vectors("resnet8", 0)}, both(0, slice(1, None))])
def test_a_block_takes_just_the_features_that_the_store_has(tmp_path, given):
    with create_cache(tmp_path / "s", **GIVEN) as writer:
        message = r"block 0 takes features \{'resnet8': \[360, 64\], 'vit-tiny_2': \[360, 7\]\}, found \{"
        with pytest.raises(ValueError, match=message):
            writer.write(0, 0, answers(0), given)
    with create_cache(tmp_path / "none", **arguments()) as writer:
        with pytest.raises(ValueError, match=r"block 0 takes features \{\}, found \{'resnet8': \[360, 64\]"):
            writer.write(0, 0, answers(0), both(0))


@pytest.mark.parametrize(
    "widths, message",
    [
        ({"../up": 3}, "a name of features is up to 64 letters, digits, _ and -, found '../up'"),
        ({"zarr.json": 3}, "found 'zarr.json'"),
        ({"a\n": 3}, "a name of features is"),
        ({"": 3}, "a name of features is"),
        ({"a" * 65: 3}, "a name of features is"),
        ({"a": 0}, "features a must be 1 to 100000 wide, found 0"),
        ({"a": 10**6}, "features a must be 1 to 100000 wide, found 1000000"),
        ({"a": True}, "features a must be 1 to 100000 wide, found True"),
        ({str(number): 1 for number in range(65)}, "features must be at most 64 names and their widths"),
        (["a"], "features must be at most 64 names and their widths, found .'a'."),
    ],
)
def test_names_and_widths_that_cannot_be_are_refused(tmp_path, widths, message):
    with pytest.raises(ValueError, match=message):
        create_cache(tmp_path / "s", **GIVEN | {"features": widths})
    assert not (tmp_path / "s").exists()


def test_features_that_are_not_there_are_refused(tmp_path):
    cache = dump(tmp_path / "s")
    with pytest.raises(CacheError, match="has no features 'resnet9': it has resnet8, vit-tiny_2"):
        cache.feature_plane("resnet9", 0)
    with pytest.raises(CacheError, match="there is no view 2: the store has views 0 to 1"):
        cache.feature_plane("resnet8", 2)
    without = create_cache(tmp_path / "none", **arguments())
    with pytest.raises(CacheError, match="has no features 'resnet8': it has none"):
        without.cache.feature_plane("resnet8", 0)
    assert without.cache.features == {}


def test_resuming_gives_the_same_bytes_and_refuses_other_features(tmp_path, three_blocks):
    dump(tmp_path / "whole")
    with create_cache(tmp_path / "s", **GIVEN) as writer:
        fill(writer, [(1, 2), (0, 1)])
    with pytest.raises(CacheError, match="features: the store has {.*}, the run has {}; choose another folder"):
        create_cache(tmp_path / "s", resume=True, **GIVEN | {"features": None})
    with create_cache(tmp_path / "s", resume=True, **GIVEN) as writer:
        fill(writer)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


def test_a_block_without_one_of_its_chunks_has_no_marker(tmp_path, monkeypatch):
    with create_cache(tmp_path / "s", **GIVEN) as writer:
        real = writer.cache._storage.write

        def write(key, data):
            if key.startswith("feature/vit"):
                raise OSError("no space")
            real(key, data)

        monkeypatch.setattr(writer.cache._storage, "write", write)
        with pytest.raises(OSError, match="no space"):
            fill(writer, [(0, 0)])
        assert (0, 0) in writer.pending()


def test_bytes_counts_every_committed_file(tmp_path):
    assert dump(tmp_path / "s").nbytes == sum(map(len, files(tmp_path / "s").values()))


# damage and malice


def test_damage_is_found_and_named(tmp_path, three_blocks):
    url = tmp_path / "s"
    dump(url)
    for place in flips(url, 100, "feature/"):
        assert problems(url), place
    (url / "feature/resnet8/c.1.2.0").unlink()
    message = "feature/resnet8, view 1, rows 240 to 359 is missing, though it was written"
    with pytest.raises(CorruptCacheError, match=message):
        open_cache(url).feature_plane("resnet8", 1)
    assert len(open_cache(url).verify_checksums()) == 1 and open_cache(url).plane(1).shape == (360, 5)


def edit(url, key, change):
    """Change the JSON document `key`, and make the store's marker agree with it."""
    document = json.loads((url / key).read_text())
    change(document)
    data = format.to_bytes(document)
    (url / key).write_bytes(data)
    files = json.loads((url / "done/store").read_text())["files"]
    files[key] = {"size": len(data), "checksum": format.digest(data)}
    (url / "done/store").write_bytes(format.marker(files))


@pytest.mark.parametrize(
    "value, message",
    [
        ({"../../etc": 3}, "has features that this version does not read: a name of features is"),
        ({"resnet8": 10**12}, "features resnet8 must be 1 to 100000 wide"),
        ({"resnet8": 65, "vit-tiny_2": 7}, "feature/resnet8/zarr.json is not what format 1 says"),
        ({"resnet9": 64}, "has no feature/resnet9/zarr.json"),
        (None, "has features that this version does not read: features must be"),
        ([], "has features that this version does not read: features must be"),
    ],
)
def test_attributes_that_make_no_sense_are_refused(tmp_path, value, message):
    dump(tmp_path / "s")
    edit(tmp_path / "s", "zarr.json", lambda document: document["attributes"].__setitem__("features", value))
    with pytest.raises(CacheError, match=message):
        open_cache(tmp_path / "s")


def test_metadata_that_differ_from_the_format_are_refused(tmp_path):
    dump(tmp_path / "s")
    edit(tmp_path / "s", "feature/resnet8/zarr.json", lambda document: document.__setitem__("data_type", "object"))
    with pytest.raises(CacheError, match="feature/resnet8/zarr.json is not what format 1 says"):
        open_cache(tmp_path / "s")


@pytest.mark.parametrize("stated", [None, {}, {"resnet8": 3}, {"resnet8": {"mean": "0", "worst": 0}}])
def test_a_marker_that_does_not_state_the_error_is_refused(tmp_path, stated):
    cache = dump(tmp_path / "s")
    path = tmp_path / "s/done/1.0"
    values = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    path.write_bytes(format.marker(**values | {"features": stated}))
    with pytest.raises(CacheError, match="is not usable: its markers do not say what was lost"):
        cache.survey()
