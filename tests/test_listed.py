"""Data sets whose files are listed: text lists as of ImageNet-LT and Places-LT, JSON as of iNaturalist."""

import io
import json
import os

import numpy as np
import pytest
import tiny
from PIL import Image

from offline_bkd.cache.shots import shot_groups
from offline_bkd.cache.views import RandomResizedCrop
from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import DecodedImages
from offline_bkd.pipeline.show import progress

# As the published lists spell them; the labels of both parts are the classes 0 to 2.
TRAIN = ["train/n01440764/n01440764_190.JPEG 0", "train/Sus scrofa/0 a.jpg 1", "train/n01443537/n01443537_2.JPEG 2"]
TEST = ["val/ILSVRC2012_val_00000001.JPEG 2", "val/ILSVRC2012_val_00000002.JPEG 0"]


def jpeg(mode="RGB", size=(16, 8), **values) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).convert(mode).save(stream, "JPEG", **values)
    return stream.getvalue()


def write(root, *files: str, data: bytes = jpeg()):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)


def lists(root, train=TRAIN, test=TEST, **values) -> schema.ImageList:
    """The two lists, and an image for each of their lines that is one."""
    for name, lines in (("train.txt", train), ("test.txt", test)):
        write(root, name, data="".join(f"{line}\n" for line in lines).encode())
        write(root, *(line.rpartition(" ")[0] for line in lines if line[:1].isalpha() and " " in line))
    return schema.ImageList(name="image_list", root=str(root), train="train.txt", test="test.txt", **values)


def inaturalist(root, change=lambda content: None) -> schema.INaturalist:
    """Both files in iNaturalist's layout, the training file changed by `change`, and their images."""
    kinds = ("Plantae", "Sus scrofa")
    for part, (first, count) in {"train2018": (0, 4), "val2018": (4, 2)}.items():
        files = [f"train_val2018/{kinds[n % 2]}/{n}.jpg" for n in range(first, first + count)]
        write(root, *files)
        content = {
            "info": {"year": 2018},
            "images": [
                {"id": first + n, "file_name": file, "width": 16, "height": 8, "license": 0, "rights_holder": "A"}
                for n, file in enumerate(files)
            ],
            "annotations": [{"id": n, "image_id": n, "category_id": 20 - 10 * (n % 2)} for n in range(first, first + count)],
            "categories": [
                {"id": 20, "name": "Dicentra formosa", "supercategory": "Plantae"},
                {"id": 10, "name": "Sus scrofa", "supercategory": "Mammalia"},
            ],
        }
        if part == "train2018":
            change(content)
        (root / f"{part}.json").write_text(json.dumps(content))
    return schema.INaturalist(name="inaturalist", root=str(root), train="train2018.json", test="val2018.json")


def test_a_list_gives_files_and_labels_in_its_order(tmp_path):
    train, test, _ = datasets.load(lists(tmp_path))
    assert train.images == [str(tmp_path / line.rpartition(" ")[0]) for line in TRAIN]
    assert train.label.tolist() == [0, 1, 2] and test.label.tolist() == [2, 0]
    assert train.classes == test.classes == ("0", "1", "2")
    assert train.sample_id.tolist() == [0, 1, 2]
    assert train.image_size.tolist() == [[8, 16]] * 3


def test_a_list_may_come_from_windows_with_tabs_and_lie_elsewhere(tmp_path):
    section = lists(tmp_path / "images")
    (tmp_path / "images" / "train.txt").rename(tmp_path / "train.txt")
    windows = "\ufeff" + "\r\n".join(line[:-2] + "\t" + line[-1] for line in TRAIN) + "\r\n\r\n"
    (tmp_path / "train.txt").write_bytes(windows.encode())
    train, _, _ = datasets.load(section.model_copy(update={"train": str(tmp_path / "train.txt")}))
    assert train.images[1].endswith("images/train/Sus scrofa/0 a.jpg") and train.label.tolist() == [0, 1, 2]


def test_classes_of_a_list_are_as_many_as_the_larger_label_of_both_parts_or_a_file_names_them(tmp_path):
    with pytest.raises(UserError, match="1 class without a training sample, but with 1 image in the test part: '3'"):
        datasets.load(lists(tmp_path, test=[*TEST, "val/3.jpg 3"]))
    section = lists(tmp_path, classes="classes.txt")
    (tmp_path / "classes.txt").write_text("tench\nwild boar\ngoldfish\n")
    assert [part.classes for part in datasets.load(section)[:2]] == [("tench", "wild boar", "goldfish")] * 2
    (tmp_path / "classes.txt").write_text("tench\nwild boar\n")
    with pytest.raises(UserError, match=r"n01443537_2.JPEG \(train.txt line 3\): label 2 is outside 0 … 1"):
        datasets.load(section)
    with pytest.raises(UserError, match="cannot read .*nothing.txt: No such file"):
        datasets.load(lists(tmp_path, classes="nothing.txt"))


@pytest.mark.parametrize(
    "content", ["\ufefftench\r\n wild boar \r\ngold\u2028fish\r\n\r\n", "tench\nwild boar\ngold\u2028fish"]
)
def test_a_file_of_classes_may_come_from_windows_and_ends_a_line_where_editors_do(tmp_path, content):
    section = lists(tmp_path, classes="classes.txt")
    (tmp_path / "classes.txt").write_bytes(content.encode())
    assert datasets.load(section)[0].classes == ("tench", "wild boar", "gold\u2028fish")


def test_a_file_of_classes_that_is_not_utf8_or_lacks_a_name_is_refused(tmp_path):
    section = lists(tmp_path, classes="classes.txt")
    (tmp_path / "classes.txt").write_bytes("a\nfélin\nc".encode("latin-1"))
    with pytest.raises(UserError, match=r"classes.txt is not UTF-8 \(byte 3: .*\); save it as UTF-8"):
        datasets.load(section)
    (tmp_path / "classes.txt").write_text("a\n\nc")
    with pytest.raises(UserError, match="classes.txt line 2 is empty; name a class on each line"):
        datasets.load(section)


def test_one_file_listed_under_two_labels_or_in_both_lists_is_noted(tmp_path, capsys):
    _, test, _ = datasets.load(lists(tmp_path, train=[*TRAIN, f"{TRAIN[0][:-2]} 1"], test=[*TEST, f"train/../{TRAIN[1]}"]))
    twice, both = (note for note in test.notes if "test image," not in note)
    assert "1 image of two labels, such as " in twice and "n01440764_190.JPEG (train.txt line 1): '0' and '1'" in twice
    assert "1 test image among the training images too, such as " in both and "0 a.jpg (test.txt line 3)" in both
    assert capsys.readouterr().err.count("note: ") == len(test.notes)


@pytest.mark.parametrize("name", ["train.txt", "classes.txt", "train2018.json", "train/n01440764/n01440764_190.JPEG"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_refused_and_not_read(tmp_path, name):
    section = inaturalist(tmp_path) if name.endswith("json") else lists(tmp_path, classes="classes.txt")
    (tmp_path / "classes.txt").write_text("a\nb\nc")
    for make in os.mkfifo, lambda path: path.symlink_to("/dev/zero"):
        (tmp_path / name).unlink()
        make(tmp_path / name)
        with pytest.raises(UserError, match=rf"^[^\n]*{os.path.basename(name)}[^\n]*no regular file[^\n]*$"):
            datasets.load(section)


def test_a_list_of_gigabytes_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    section = lists(tmp_path)
    monkeypatch.setattr("offline_bkd.pipeline.data.lists.MOST_BYTES", 50)
    with pytest.raises(UserError, match="train.txt holds more than 50 bytes"):
        datasets.load(section)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train/1.jpg", r"train.txt line 2: 'train/1.jpg' is not a path and a label; write relative/path.jpg, a space and"),
        ("", r"train.txt line 2 is empty; remove it"),
        ("7", r"train.txt line 2: '7' is not a path and a label"),
        ("train/1.jpg,1", r"line 2: .* is not a path and a label"),
        ("train/1.jpg -1", r"line 2: .* is not a path and a label; .* a whole number from 0 to 99,999"),
        ("train/1.jpg 1.0", r"line 2: .* is not a path and a label"),
        ("train/1.jpg " + "9" * 5000, r"line 2: .{,120} is not a path and a label"),
        ("../1.jpg 1", r"train.txt line 2: '../1.jpg' is outside .*; paths start from data.root and stay in it"),
        ("train/../../1.jpg 1", r"line 2: .* is outside"),
        ("/etc/passwd 1", r"line 2: '/etc/passwd' is outside"),
        ("train/.. 1", r"line 2: .* is outside"),
        ("train/1\0.jpg 1", r"1\\x00.jpg \(train.txt line 2\) cannot be read: embedded null byte"),
    ],
)
def test_what_is_wrong_with_a_line_is_named(tmp_path, line, message):
    section = lists(tmp_path, train=[TRAIN[0], "train/1.jpg 1", TRAIN[2]])
    (tmp_path / "train.txt").write_text("\n".join([TRAIN[0], line, TRAIN[2]]))
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        datasets.load(section)


def test_a_list_that_is_missing_empty_or_no_text_is_named(tmp_path):
    section = lists(tmp_path)
    for data, message in (
        (b"\n", r"train.txt is empty; list an image on each line"),
        (b"train/\xff.jpg 0\n", r"train.txt is not UTF-8 \(byte 6: invalid start byte\); save it as UTF-8"),
    ):
        (tmp_path / "train.txt").write_bytes(data)
        with pytest.raises(UserError, match=message):
            datasets.load(section)
    (tmp_path / "train.txt").unlink()
    with pytest.raises(UserError, match="cannot read .*train.txt: No such file or directory; check data.root"):
        datasets.load(section)


def test_images_that_are_missing_are_named_with_their_lines_when_the_set_is_loaded(tmp_path):
    section = lists(tmp_path)
    for line in TRAIN[:2]:
        os.unlink(tmp_path / line[:-2])
    message = r"190.JPEG \(train.txt line 1\) cannot be read: No such file or directory; .*/0 a.jpg \(train.txt line 2\)"
    with pytest.raises(UserError, match=rf"{message} [^\n]*: restore them or correct data.root$"):
        datasets.load(section)


def test_every_file_is_asked_for_its_size_once_and_its_part_is_named_meanwhile(tmp_path, monkeypatch, capsys):
    section = lists(tmp_path)
    monkeypatch.setattr(progress, "SHORT_SECONDS", 0)  # so that how far it is is printed
    asked, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **values: asked.append(str(path)) or stat(path, **values))
    train, test, _ = datasets.load(section)
    _ = train.fingerprint, test.fingerprint
    asked = [path for path in asked if path.startswith(str(tmp_path)) and path.lower().endswith(("jpg", "jpeg"))]
    assert sorted(asked) == sorted([*train.images, *test.images])
    said = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"reading {part.part} images {len(part)}/{len(part)}" for part in (train, test)]
    assert (train.part, test.part) == ("training", "test")


def test_the_fingerprint_of_a_list_follows_its_paths_and_sizes_not_its_folder(tmp_path):
    first = datasets.load(lists(tmp_path / "a"))[0].fingerprint
    section = lists(tmp_path / "b")
    assert datasets.load(section)[0].fingerprint == first
    write(tmp_path / "b", "train/Sus scrofa/0 a.jpg", data=jpeg() + b"more")
    changed = datasets.load(section)[0].fingerprint
    assert {part for part in first if first[part] != changed[part]} == {"images"}


def test_odd_jpegs_are_read_upright_in_rgb_and_a_truncated_one_is_named_with_its_line(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    odd = {"grey": jpeg("L"), "cmyk": jpeg("CMYK"), "turned": jpeg(exif=exif), "progressive": jpeg(progressive=True)}
    section = lists(tmp_path, train=[*TRAIN, *(f"odd kinds/{name}.jpg 1" for name in odd)])
    for name, data in odd.items():
        write(tmp_path, f"odd kinds/{name}.jpg", data=data)
    train, _, _ = datasets.load(section)
    assert train.image_size.tolist() == [[8, 16]] * 3 + [[8, 16], [8, 16], [16, 8], [8, 16]]
    images = DecodedImages(train, RandomResizedCrop(size=4, count=2), tiny.CPU, 0)
    (batch,) = images.batches(np.arange(7), np.ones(7, np.int64), 7)
    pixels = batch.images.float().mean((2, 3)).round().tolist()
    assert batch.images.shape == (7, 3, 4, 4)
    for name, pixel in zip(odd, pixels[3:]):
        expected = [125] * 3 if name == "grey" else [200, 100, 50]
        assert np.abs(np.subtract(pixel, expected)).max() <= 8, name
    whole = jpeg(size=(200, 200))
    write(tmp_path, "odd kinds/cmyk.jpg", data=whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cmyk.jpg \(train.txt line 5\) cannot be read as an image: .*truncated"):
        _ = datasets.load(section)[0].image_size


@pytest.mark.parametrize("layout", ["list", "json"])
def test_shot_groups_are_those_of_the_published_sets(tmp_path, layout):
    """Many-shot classes have more than 100 training samples, medium 20 to 100, few below 20."""
    counts = [5, 101, 19, 100, 20]
    labels = np.repeat(np.arange(5), counts)
    files = [f"train/{row}.jpg" for row in range(len(labels))]
    if layout == "list":
        section = lists(tmp_path, train=[f"{file} {label}" for file, label in zip(files, labels)], test=["test/0.jpg 0"])
    else:
        write(tmp_path, *files)
        for name, rows in (("train.json", range(len(labels))), ("val.json", range(5))):
            content = {
                "images": [{"id": row, "file_name": files[row]} for row in rows],
                "annotations": [{"image_id": row, "category_id": int(labels[row])} for row in rows],
                "categories": [{"id": label} for label in range(5)],
            }
            (tmp_path / name).write_text(json.dumps(content))
        section = schema.INaturalist(name="inaturalist", root=str(tmp_path), train="train.json", test="val.json")
    train, _, _ = datasets.load(section)
    assert len(train) == 245 and train.class_counts.tolist() == counts
    groups = {name: np.flatnonzero(members).tolist() for name, members in shot_groups(train.class_counts).items()}
    assert groups == {"many": [1], "medium": [3, 4], "few": [0, 2]}


def test_inaturalists_json_may_begin_with_a_byte_order_mark(tmp_path):
    section = inaturalist(tmp_path)
    (tmp_path / "train2018.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "train2018.json").read_bytes())
    assert len(datasets.load(section)[0]) == 4


def test_inaturalist_joins_annotations_to_images_whatever_their_order(tmp_path):
    train, test, _ = datasets.load(inaturalist(tmp_path, lambda content: content["annotations"].reverse()))
    assert train.classes == test.classes == ("Sus scrofa", "Dicentra formosa"), "by id"
    assert [os.path.relpath(path, tmp_path) for path in train.images] == [
        "train_val2018/Plantae/0.jpg",
        "train_val2018/Sus scrofa/1.jpg",
        "train_val2018/Plantae/2.jpg",
        "train_val2018/Sus scrofa/3.jpg",
    ]
    assert train.label.tolist() == [1, 0, 1, 0] and test.label.tolist() == [1, 0]
    assert train.image_size.tolist() == [[8, 16]] * 4
    reversed_again = datasets.load(inaturalist(tmp_path, lambda content: content["categories"].reverse()))[0]
    assert reversed_again.label.tolist() == train.label.tolist()


@pytest.mark.parametrize(("names", "expected"), [(["7", "9"], ("9", "7")), ([7, 9], ("9", "7")), (["a", "a"], ("10", "20"))])
def test_categories_are_named_by_their_names_or_where_these_do_not_differ_by_their_ids(tmp_path, names, expected):
    def rename(content):
        for category, name in zip(content["categories"], names):
            category["name"] = name

    section = inaturalist(tmp_path, rename)
    (tmp_path / "val2018.json").write_bytes((tmp_path / "train2018.json").read_bytes())
    assert datasets.load(section)[0].classes == expected


def change(what, row, **values):
    return lambda content: content[what][row].update(values)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (change("annotations", 2, image_id=1), r"1 images with several annotations: 1; each image needs one annotation"),
        (lambda content: content["annotations"].pop(), r"1 images without an annotation: 3;"),
        (lambda content: content["images"].pop(), r"1 annotated images that are not listed: 3;"),
        (change("images", 1, id=0), r"1 image ids that come twice: 0;"),
        (change("categories", 0, id=10), r"1 category ids that come twice: 10;"),
        (change("annotations", 0, category_id=7), r"1 annotated categories that are not listed: 7;"),
        (change("images", 1, file_name=5), r"JSON: images\.1\.file_name: Input should be a valid string; it must hold"),
        (lambda content: content["images"][1].pop("file_name"), r"JSON: images\.1\.file_name: Field required"),
        (change("annotations", 0, category_id="x"), r"JSON: annotations\.0\.category_id: .*integer"),
        (lambda content: content.pop("annotations"), r"train2018.json is not iNaturalist's JSON: annotations: Field required"),
        (lambda content: content["categories"].clear(), r"2 annotated categories that are not listed: 10, 20;"),
        (change("images", 1, file_name="../1.jpg"), r"train2018.json image number 2: '../1.jpg' is outside"),
        (change("images", 1, file_name="1.jpg"), r"/1.jpg \(train2018.json image number 2\) cannot be read: No such file"),
        (change("categories", 0, name="Dicentra"), r"differ in their classes: only one has 'Dicentra', 'Dicentra formosa'"),
    ],
)
def test_what_is_wrong_with_inaturalists_json_is_named(tmp_path, broken, message):
    with pytest.raises(UserError, match=rf"^[^\n]*{message}[^\n]*$"):
        datasets.load(inaturalist(tmp_path, broken))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10_000, "\0"])
def test_a_file_that_is_no_json_of_this_kind_is_one_line(tmp_path, text):
    section = inaturalist(tmp_path)
    (tmp_path / "train2018.json").write_text(text)
    with pytest.raises(UserError, match=r"^[^\n]*train2018.json is not iNaturalist's JSON: the file: [^\n]*$"):
        datasets.load(section)
