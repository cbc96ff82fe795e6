"""Data sets: the long-tailed draw, the layouts that are read, and what is wrong with them, named before training."""

import fcntl
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tiny
from pictures import png
from test_parquet import parquet, section

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.data import datasets

ROOT = Path(__file__).parent.parent


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
    train, _, _ = datasets.load(schema.Digits(name="digits"))
    first, again, other = (datasets.long_tailed(train, 20, None, seed) for seed in (3, 3, 4))
    assert first.class_counts.tolist() == datasets.long_tailed_counts(10, train.class_counts[0], 20).tolist()
    np.testing.assert_array_equal(first.sample_id, again.sample_id)
    assert not np.array_equal(first.sample_id, other.sample_id)
    # a larger ratio keeps a part of what a smaller one keeps, so sets of one seed are nested
    assert set(datasets.long_tailed(train, 50, None, 3).sample_id) < set(first.sample_id)
    shuffled = datasets.long_tailed(train.take(np.random.default_rng(0).permutation(len(train))), 20, None, 3)
    assert set(shuffled.sample_id) == set(first.sample_id)


def test_an_imbalanced_set_can_be_thinned_further_but_not_made_larger():
    train, _, _ = datasets.load(schema.Digits(name="digits", imbalance_ratio=20))
    assert len(datasets.long_tailed(train, 40, None, 0)) < len(train)
    with pytest.raises(UserError, match=r"ratio 10 asks for 106 samples of class '1', which has 98; lower data.max_per_class"):
        datasets.long_tailed(train, 10, None, 0)
    with pytest.raises(UserError, match=r"asks for 0 samples of class '7'.*raise data.max_per_class"):
        datasets.long_tailed(train, 1000, None, 0)


def test_a_share_of_every_class_is_held_out_for_validation():
    section = schema.Digits(name="digits", imbalance_ratio=20)
    whole, test, none = datasets.load(section)
    training, same_test, validation = datasets.load(section.model_copy(update={"validation": 0.1}))
    assert none is None and same_test.fingerprint == test.fingerprint
    assert sorted([*training.sample_id, *validation.sample_id]) == sorted(whole.sample_id)
    assert validation.class_counts.tolist() == np.maximum(1, np.rint(whole.class_counts * 0.1)).tolist()
    assert validation.classes == training.classes
    again = datasets.load(section.model_copy(update={"validation": 0.1}))
    other = datasets.load(section.model_copy(update={"validation": 0.1, "seed": 1}))
    assert again.validation.fingerprint == validation.fingerprint
    assert set(other.validation.sample_id) != set(validation.sample_id)


def test_what_is_held_out_does_not_depend_on_what_else_there_is(tmp_path):
    whole, _, _ = datasets.load(schema.Digits(name="digits"))
    shuffled = whole.take(np.random.default_rng(0).permutation(len(whole)))
    (_, held), (_, same) = datasets.hold_out(whole, 5, 3), datasets.hold_out(shuffled, 5, 3)
    assert set(held.sample_id) == set(same.sample_id) and held.class_counts.tolist() == [5] * 10
    _, share = datasets.hold_out(whole, 0.1, 3)
    _, without = datasets.hold_out(whole.take(np.flatnonzero(whole.label != 7)), 0.1, 3)
    assert set(without.sample_id) == set(share.sample_id[share.label != 7])


def test_no_class_is_held_out_whole(tmp_path, capsys):
    names = ("cat", "dog", "eel")
    parquet(tmp_path, [0] * 9 + [1, 2, 2], names=names)
    parquet(tmp_path, [0, 1, 2], "test-0.parquet", names, [png(row) for row in (97, 98, 99)])
    training, _, validation = datasets.load(section(tmp_path, validation=0.9))
    assert training.class_counts.tolist() == [1, 1, 1] and validation.class_counts.tolist() == [8, 0, 1]
    assert "1 class without a validation image, and so without an accuracy: 'dog'" in capsys.readouterr().err
    with pytest.raises(
        UserError, match="holds out 2 samples of each class, but there are no more of 2 classes: 'dog', 'eel'; lower it, or"
    ):
        datasets.load(section(tmp_path, validation=2))


def test_a_validation_part_may_have_files_of_its_own(tmp_path, capsys):
    parquet(tmp_path, [0, 1, 0])
    parquet(tmp_path, [0, 1], "test-0.parquet", images=[png(98), png(99)])
    parquet(tmp_path, [1, 0], "val-0.parquet", images=[png(96), png(0)])
    training, test, validation = datasets.load(section(tmp_path, validation="val-*.parquet"))
    assert [len(part) for part in (training, test, validation)] == [3, 2, 2] and validation.label.tolist() == [1, 0]
    said = capsys.readouterr().err
    assert said.count("note: ") == 1 and "1 validation image among the training images too" in said
    parquet(tmp_path, [1, 2], "val-0.parquet", names=("cat", "dog"))
    with pytest.raises(UserError, match="label 2 is outside 0 … 1 .* in the validation part"):
        datasets.load(section(tmp_path, validation="val-*.parquet"))
    with pytest.raises(UserError, match="no file matches 'no.parquet' in .*; check data.root and data.validation"):
        datasets.load(section(tmp_path, validation="no.parquet"))


def test_an_expert_is_validated_on_its_own_classes():
    section = schema.Digits(name="digits", imbalance_ratio=20, validation=1)
    training, test, validation = datasets.load(section, "few")
    assert set(training.label) == set(test.label) == set(validation.label) and len(set(training.label)) < 10


@pytest.mark.parametrize("value", [0, -1, 1.0, 1.5, 0.0, True, [0.1], "a file"])
def test_a_validation_part_that_cannot_be_is_refused_with_what_can_be(value):
    with pytest.raises(
        UserError, match=r"data.validation|data: .*(a share of|as validation: give a share of the training images)"
    ):
        tiny.experiment(f"data.validation={value}")


def test_digits_are_scikit_learns_with_a_balanced_test_part():
    from sklearn.datasets import load_digits

    train, test, _ = datasets.load(schema.Digits(name="digits"))
    source = load_digits()
    assert test.class_counts.tolist() == [40] * 10 and len(train) + len(test) == len(source.target)
    assert not set(train.sample_id) & set(test.sample_id)
    pixels = np.asarray(train.decode(5))[..., 0] / 255 * 16
    np.testing.assert_allclose(pixels, source.images[train.sample_id[5]], atol=0.04)


@pytest.mark.parametrize("names", [None, ("cat", "dog", "eel")])
def test_a_class_without_test_images_is_noted_whether_or_not_classes_are_named(tmp_path, names, capsys):
    parquet(tmp_path, [0, 1, 2], names=names)
    parquet(tmp_path, [0, 1], "test-0.parquet", names=names)
    train, test, _ = datasets.load(section(tmp_path))
    note = f"1 class without a test image, and so without an accuracy: {(names or '012')[2]!r}"
    assert train.classes == test.classes and test.class_counts.tolist() == [1, 1, 0]
    assert any(note in line for line in test.notes) and note in capsys.readouterr().err


def test_names_that_one_part_gives_are_those_of_both(tmp_path):
    parquet(tmp_path, [0, 1])
    parquet(tmp_path, [0, 1], "test-0.parquet", names=None)
    assert [part.classes for part in datasets.load(section(tmp_path))[:2]] == [("cat", "dog")] * 2


@pytest.mark.parametrize(
    ("train", "test", "names", "message"),
    [
        ([1, 2], [1, 2], None, "1 class without a training sample: '0'; its labels begin at 1: number them from 0"),
        (
            [1, 2],
            [1, 2],
            ("a", "b"),
            "label 2 is outside 0 … 1 .*training part, whose labels run from 1 to 2.*; number labels from",
        ),
        (
            [0, 1],
            [-1, -1],
            ("a", "b"),
            "every label of the test part is negative, as where there are none; name labelled data",
        ),
        ([0, 1], [-1, -1], None, "every label of the test part is negative"),
        ([-1, -1], [-1, -1], None, "every label of the training part is negative"),
        (
            [0, 1],
            [0, 1, 2],
            None,
            "1 class without a training sample, but with 1 image in the test part: '2'; leave",
        ),
    ],
)
def test_labels_that_do_not_fit_the_classes_are_one_line_that_says_both(tmp_path, train, test, names, message):
    parquet(tmp_path, train, names=names)
    parquet(tmp_path, test, "test-0.parquet", names=names)
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        datasets.load(section(tmp_path))


def test_an_image_under_two_labels_or_in_both_parts_is_noted(tmp_path, capsys):
    parquet(tmp_path, [0, 1, 1, 0], images=[png(5), png(6), png(5), png(7)])
    parquet(tmp_path, [0, 1], "test-0.parquet", images=[png(7), png(8)])
    _, test, _ = datasets.load(section(tmp_path))
    assert "1 image of two labels, such as " in test.notes[0] and "sample 0: 'cat' and 'dog'" in test.notes[0]
    assert "1 test image among the training images too, such as " in test.notes[1] and "sample 0;" in test.notes[1]
    assert [line.removeprefix("note: ") for line in capsys.readouterr().err.splitlines()] == list(test.notes)
    assert not datasets.load(schema.Digits(name="digits"))[1].notes


def test_one_of_several_processes_prints_the_notes(tmp_path, capsys, monkeypatch):
    parquet(tmp_path, [0, 1, 1])
    parquet(tmp_path, [0, 0], "test-0.parquet")
    monkeypatch.setenv("RANK", "1")
    assert datasets.load(section(tmp_path))[1].notes
    assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["a\x1b[2J", "b\n", "c\udce9"])
def test_class_names_are_refused_that_a_terminal_would_obey(tmp_path, name):
    for file in "train-0.parquet", "test-0.parquet":
        parquet(tmp_path, [0, 1], file, names=("cat", name))
    with pytest.raises(
        UserError, match=r"^[^\n\x1b]*the class name '[^\n\x1b]*' is not UTF-8 that can be printed; rename it$"
    ):
        datasets.load(section(tmp_path))


def test_class_names_that_cannot_be_told_apart_are_refused(tmp_path):
    parquet(tmp_path, [0, 1], "test-0.parquet", names=("cat", "cat"))
    parquet(tmp_path, [0, 1], "train-0.parquet", names=("cat", "cat"))
    with pytest.raises(UserError, match="class names must be distinct texts"):
        datasets.load(section(tmp_path))
    parquet(tmp_path, [0, 0], "test-0.parquet", names=("cat",))
    parquet(tmp_path, [0, 0], "train-0.parquet", names=("cat",))
    with pytest.raises(UserError, match="has 1 class; there must be 2 to 100,000"):
        datasets.load(section(tmp_path))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A folder of small archives in CIFAR's own layout; their checksums, not the real ones, torchvision is told to accept."""
    import pickle

    from torchvision.datasets import CIFAR10, CIFAR100

    generator, names = np.random.default_rng(0), list("abcdefghij")
    ten = ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]
    kinds = (CIFAR10, ten, "labels", "batches.meta"), (CIFAR100, ["train", "test"], "fine_labels", "meta")
    for source, files, labels, meta in kinds:
        folder = tmp_path / source.base_folder
        folder.mkdir()
        for name in files:
            batch = {"data": generator.integers(0, 256, (20, 3072), dtype=np.uint8), labels: [*range(10)] * 2}
            (folder / name).write_bytes(pickle.dumps(batch))
        (folder / meta).write_bytes(pickle.dumps({source.meta["key"]: names}))
        monkeypatch.setattr(source, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path


def test_cifar_is_read_through_torchvision(cifar):
    train, test, _ = datasets.load(schema.Cifar(name="cifar10", root=str(cifar)))
    assert train.classes == tuple("abcdefghij") and train.class_counts.tolist() == [10] * 10 and len(test) == 20
    assert train.image_size[0].tolist() == [32, 32]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_example_writes_cifar_as_the_configurations_read_it(cifar, monkeypatch, name):
    spec = importlib.util.spec_from_file_location("cifar_parquet", ROOT / "examples" / "cifar_parquet.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    written = example.main(str(cifar))
    before = [path.stat().st_mtime_ns for path in written]
    assert len(written) == 4 and example.main(str(cifar)) == []
    assert [path.stat().st_mtime_ns for path in written] == before, "what is there is not written over"
    monkeypatch.setenv("OFFLINE_BKD_DATA", str(cifar))
    section = load_config(ROOT / "configs" / f"{name}-lt-quick.yaml", ["data.imbalance_ratio=null"]).data
    for written, own in zip(datasets.load(section), datasets.load(schema.Cifar(name=name, root=str(cifar)))[:2]):
        assert written.classes == own.classes and np.array_equal(written.label, own.label)
        assert all(np.array_equal(written.decode(row), own.decode(row)) for row in range(len(own)))


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        with open(tmp_path / ".lock") as other, pytest.raises(BlockingIOError):  # other processes wait meanwhile
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(UserError, match="cannot load or download cifar100 into .*: no route"):
        datasets.load(schema.Cifar(name="cifar100", root=str(tmp_path)))


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("OFFLINE_BKD_DATA", raising=False)
    with pytest.raises(UserError, match="OFFLINE_BKD_DATA in .* is not set; set it, or give another path"):
        datasets.load(schema.Digits(name="digits", root="${OFFLINE_BKD_DATA}/x"))


def test_the_fingerprint_tells_pixels_labels_and_choice_apart():
    train, _, _ = datasets.load(tiny.experiment().data)
    same = train.take(np.arange(len(train)))
    assert same.fingerprint == train.fingerprint
    changed = train.take(np.arange(len(train)))
    changed.images[0, 0, 0] ^= 1
    assert {k for k in train.fingerprint if changed.fingerprint[k] != train.fingerprint[k]} == {"images"}
    fewer = train.take(np.arange(1, len(train)))
    assert {k for k in train.fingerprint if fewer.fingerprint[k] == train.fingerprint[k]} == set()


def test_a_validation_part_that_would_be_empty_is_refused():
    labels = np.arange(4)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    alone = datasets.Dataset(name="few", classes=("a", "b", "c", "d"), sample_id=labels, label=labels, images=pixels)
    with pytest.raises(UserError, match="few: data.validation 0.1 holds out nothing of classes this small; leave it out"):
        datasets.hold_out(alone, 0.1, 0)
