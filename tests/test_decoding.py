"""Pixels: upright, in RGB, 8 bits a channel, whatever the file; and what cannot be decoded is named."""

import hashlib
import importlib.util
import io
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import png
from PIL import Image, ImageOps, PngImagePlugin
from test_folders import folder_of_images

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.data import datasets, decoding


def test_odd_images_are_decoded_upright_in_rgb_and_broken_ones_named(tmp_path):
    section = folder_of_images(tmp_path)
    ant = tmp_path / "train" / "ant"
    (ant / "0.jpg").write_bytes(png(0, (16, 8), "JPEG", "CMYK"))
    (ant / "1.jpg").write_bytes(png(0, (16, 8), "JPEG", "L"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (16, 8)).save(ant / "2.jpg", exif=exif)
    train, _, _ = datasets.load(section)
    sizes = dict(zip([Path(path).name for path in train.images], train.image_size.tolist()))
    assert (sizes["0.jpg"], sizes["1.jpg"], sizes["2.jpg"]) == ([8, 16], [8, 16], [16, 8])
    for row in range(len(train)):
        image = train.decode(row)
        assert image.mode == "RGB" and image.size[::-1] == tuple(train.image_size[row])
    whole = png(0, (64, 64), "JPEG")
    (ant / "3.jpg").write_bytes(whole[: len(whole) // 2])
    (ant / "4.jpg").write_bytes(b"not an image")
    train, _, _ = datasets.load(section)
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
    train, _, _ = datasets.load(section)
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
    train, _, _ = datasets.load(section)
    sizes = {Path(path).name: size for path, size in zip(train.images, train.image_size.tolist())}
    assert sizes["0.jpg"] == [80, 160]
    for orientation in range(10):
        assert sizes[f"turned{orientation}.jpg"] == ([160, 80] if 5 <= orientation <= 8 else [80, 160])
    assert [list(train.decode(row).size[::-1]) for row in range(len(train))] == train.image_size.tolist()


def encoded(image: Image.Image, format: str, **values) -> io.BytesIO:
    stream = io.BytesIO()
    image.save(stream, format, **values)
    return io.BytesIO(stream.getvalue())


def tiff(values: np.ndarray, bits: int, photometric: int = 1, kind: int = 1, order: str = "<") -> io.BytesIO:
    """A grey TIFF of `values`, uint8 or wider, as other programs write it: 12 bits are packed, kind 2 is signed."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)
        words = (pairs[:, 0] << 12) | pairs[:, 1]
        data = b"".join(int(word).to_bytes(3, "big") for word in words)
    else:
        data = values.astype(np.dtype(f"{order}{'i' if kind == 2 else 'u'}{bits // 8}")).tobytes()
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
        339: kind,
    }
    at = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at)
    return io.BytesIO(head + data + b"\0" * (len(data) % 2) + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes what decoding.py asks for

GREYS = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    "file",
    [
        tiff(GREYS, 8),
        tiff(GREYS * 257, 16),
        tiff(GREYS * 257, 16, order=">"),
        tiff(65535 - GREYS * 257, 16, photometric=0),
        tiff(np.round(GREYS * (4095 / 255)), 12),
        io.BytesIO(b"P5 16 16 65535\n" + (GREYS * 257).astype(">u2").tobytes()),
        io.BytesIO(b"P5 16 16 4095\n" + np.round(GREYS * (4095 / 255)).astype(">u2").tobytes()),
        encoded(Image.fromarray((GREYS * 257).astype(np.uint16)), "PNG"),
    ],
    ids=["8", "16", "16 big-endian", "16 white is zero", "12", "PGM 16", "PGM 12", "PNG 16"],
)
def test_greys_of_more_than_eight_bits_are_the_same_greys(file):
    np.testing.assert_array_equal(np.asarray(decoding.decode(file)), np.repeat(GREYS[..., None], 3, axis=2))


@pytest.mark.parametrize(
    "file",
    [
        encoded(Image.fromarray(GREYS.astype(np.int32)), "TIFF"),
        tiff(GREYS, 32),
        tiff(GREYS, 16, kind=2),
        tiff(GREYS // 2, 8, kind=2),
    ],
)
def test_numbers_without_a_known_white_are_refused_and_not_guessed(file):
    with pytest.raises(ValueError, match=r"its numbers of \d+ bits have no known white; save it with 8 or 16 bits, unsigned"):
        decoding.decode(file)


def jpeg_with(tags: list[tuple[int, int, int, bytes]], order: str = "<") -> io.BytesIO:
    """A 16 x 8 JPEG, its left half dark, whose EXIF holds `tags` (number, type, count, four bytes) as they are."""
    entries = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    exif = b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(tags)) + entries
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 250
    return encoded(Image.fromarray(pixels), "JPEG", exif=exif + b"\0" * 4, quality=95)


ORIENTATION = 274, 3, 1, b"\x06\0\0\0"


@pytest.mark.parametrize(
    "odd",
    [
        (0, 2, 4, b"2300"),  # GPSVersionID as text
        (34853, 4, 1, struct.pack("<I", 2**31)),  # its block far outside
        (34665, 4, 1, struct.pack("<I", 8)),  # a block that is this one
        (282, 5, 1, struct.pack("<I", 2**20)),  # a fraction that is not there
        (37510, 7, 2**31, b"\0\0\0\0"),  # a comment of two gigabytes
        (33434, 99, 1, b"\0\0\0\0"),  # of no known type
        (270, 2, 0, b"\0\0\0\0"),
        (305, 13, 7, b"\xff\xff\xff\xff"),
    ],
    ids=lambda tag: str(tag[0]),
)
def test_an_image_is_turned_whatever_its_other_tags_hold(odd):
    image = decoding.decode(jpeg_with(sorted([ORIENTATION, odd])))
    pixels = np.asarray(image)[..., 0]
    assert image.size == (8, 16) and pixels[0].max() < 60 < 200 < pixels[-1].min()
    assert decoding.image_size(jpeg_with(sorted([ORIENTATION, odd]))) == (16, 8)


@pytest.mark.parametrize(
    "orientation",
    [
        (274, 3, 1, b"\0\0\0\0"),
        (274, 3, 1, b"\x09\0\0\0"),
        (274, 2, 2, b"6\0\0\0"),
        (274, 5, 1, b"aaaa"),
    ],
)
def test_an_orientation_that_means_nothing_turns_nothing(orientation):
    assert decoding.decode(jpeg_with([orientation])).size == (16, 8)


@pytest.mark.parametrize("exif", [b"", b"Exif", b"Exif\0\0", b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_an_image_whose_exif_cannot_be_read_at_all_is_as_it_is_stored(exif):
    file = encoded(Image.fromarray(np.zeros((8, 16, 3), np.uint8)), "JPEG", exif=exif)
    assert decoding.decode(file).size == (16, 8) and decoding.image_size(file) == (8, 16)
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n 8\nno hexadecimal number {exif!r}\n")
    assert decoding.decode(encoded(Image.new("RGB", (16, 8)), "PNG", pnginfo=text)).size == (16, 8)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_as_pillow_turns_it(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    file = encoded(Image.fromarray(pixels), format, exif=exif)
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue()))).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decoding.decode(file)), theirs)
    assert decoding.image_size(file) == theirs.shape[:2]


def test_palettes_and_odd_tags_print_nothing(tmp_path, checkout):
    palette = encoded(Image.fromarray(GREYS.astype(np.uint8)).convert("P"), "PNG", transparency=bytes(range(256)))
    (tmp_path / "palette.png").write_bytes(palette.getvalue())
    (tmp_path / "odd.jpg").write_bytes(jpeg_with([(274, 3, 2, b"\x06\0\x06\0")]).getvalue())
    script = """
import sys
from offline_bkd.pipeline.data import decoding
print([decoding.decode(open(path, "rb")).size for path in sys.argv[1:]])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "palette.png"), str(tmp_path / "odd.jpg")]
    run = subprocess.run(command, env=checkout, capture_output=True, text=True)
    assert run.stdout == "[(16, 16), (8, 16)]\n" and not run.stderr


def test_an_image_of_more_pixels_than_the_limit_is_refused_before_it_is_decoded():
    for size in (8193, 8193), (13_100, 13_100), (14_000, 14_000):
        head = b"P5 %d %d 255\n" % size  # 67, 171 and 196 million
        for read in decoding.decode, decoding.image_size:
            with pytest.raises(ValueError, match=r"pixels, 67,108,864 at most are decoded; make it smaller"):
                read(io.BytesIO(head))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_a_damaged_file_gives_pixels_or_one_line_with_its_name(tmp_path, format):
    section = folder_of_images(tmp_path)
    path = tmp_path / "train" / "ant" / "0.png"
    exif = Image.Exif()
    exif[0x0112], exif[270] = 6, "a" * 40
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(pixels), format, **({} if format in ("BMP", "GIF", "PPM") else {"exif": exif})).getvalue()
    train, _, _ = datasets.load(section)
    row = train.images.index(str(path))
    generator = np.random.default_rng(2)
    for turn in range(60):
        damaged = bytearray(whole[: len(whole) // 2] if turn % 6 == 5 else whole)
        for place in generator.integers(0, min(len(damaged), 400), 3):
            damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            assert train.decode(row).mode == "RGB"
        except UserError as error:
            assert str(error).startswith(f"{path} cannot be read as an image: ") and "\n" not in str(error)


def test_pixels_are_what_they_were():
    """Of a photograph, by every version of the decoder: an answer that was cached is for these pixels."""
    file = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "images" / "china.jpg"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"
    with open(file, "rb") as photograph:
        crop = decoding.decode(photograph).crop((31, 17, 431, 317)).resize((224, 224), Image.Resampling.BILINEAR)
    digest = hashlib.sha256(np.asarray(crop).tobytes()).hexdigest()
    assert digest == "f1f02bfa0dbe0df8f2294c0e12559d6d36ad31105b26cd2840d38f5c801137be"
