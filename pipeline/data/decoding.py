"""From an image file to its pixels: upright, in RGB, 8 bits a channel, by integer arithmetic that is the same everywhere.

What an image file holds is another's doing: whatever a decoder makes of it, the caller gets pixels or a ValueError.
"""

import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

SUFFIXES = {
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
}  # fmt: skip
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # the same, to Pillow; trying its forty takes longer
# What makes a view's pixels, beside its box: a store's answers are to these. The whole image is decoded, in integers, the crop
# is cut and then resized. Faster ways round otherwise, and torch's resizing does so by the processor's instructions.
DECODER = "pillow, crop, bilinear"
MOST_PIXELS = 2**26  # of an image, 67 million: decoded, it takes four bytes for each, twice where colours are converted
TURNS = {  # by the EXIF orientation, what puts an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Of an odd tag or palette Pillow warns without the file's name, on any thread; what cannot be decoded is an error with it.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(file: BinaryIO) -> Image.Image:
    """The image in `file`, upright, of mode RGB. Raises ValueError that says why there is none."""
    return _decode(file, draft=False)[0]


def image_size(file: BinaryIO) -> tuple[int, int]:
    """(height, width) of the image in `file`, upright. Raises ValueError where the image cannot be decoded to its end."""
    return _decode(file, draft=True)[1]


def _decode(file: BinaryIO, draft: bool) -> tuple[Image.Image, tuple[int, int]]:
    try:
        image = Image.open(file, formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"it has {width:,} x {height:,} pixels, {MOST_PIXELS:,} at most are decoded; make it smaller")
        # a JPEG need not be decoded at full size to see that it is whole
        drafted = draft and image.draft("RGB", (1, 1)) is not None
        image.load()
        orientation = _orientation(image)
        image = rgb(image)
        if orientation in TURNS:
            image = image.transpose(TURNS[orientation])
        if not drafted:
            width, height = image.size
        elif orientation in (5, 6, 7, 8):
            width, height = height, width
        return image, (height, width)
    except UnidentifiedImageError:
        raise ValueError("no known format")
    except Image.DecompressionBombError:
        raise ValueError(f"it has too many pixels, {MOST_PIXELS:,} at most are decoded; make it smaller")
    except Exception as error:  # of any kind: damaged files drive decoders into all of them
        raise ValueError(str(error) or type(error).__name__)


def _orientation(image: Image.Image) -> int | None:
    """What the EXIF says, whatever its other tags hold. A TIFF is upright once it is loaded, and says so."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return orientation if isinstance(orientation, int) else None
    except Exception:  # no tag can be read
        return None


def rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, 8 bits a channel. Raises ValueError where its numbers have no known black and white."""
    white, inverted = 2**16 - 1, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
        if image.tag_v2.get(TiffImagePlugin.SAMPLEFORMAT, (1,))[0] == 2 or image.mode == "I":
            raise ValueError(f"its numbers of {bits} bits have no known white; save it with 8 or 16 bits, unsigned")
        white, inverted = 2**bits - 1, image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode == "F":
        raise ValueError("it holds floating-point pixels; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # grey of more than 8 bits, which convert() would clip
        grey = (np.asarray(image, np.float64) * (255 / white)).clip(0, 255).round().astype(np.uint8)
        image = Image.fromarray(255 - grey if inverted else grey)
    return image if image.mode == "RGB" else image.convert("RGB")
