"""Data sets: labels, class names and undecoded images of a training and a test part, and the long-tailed draw.

Left out: crops and tensors (images.py). Shapes: N samples, C classes.
"""

import glob
import hashlib
import io
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, NotRequired

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pydantic import FailFast, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from offline_bkd.cache import philox
from offline_bkd.pipeline import UserError, config, metrics, schema
from offline_bkd.pipeline.show.progress import Progress

MOST_CLASSES = 100_000
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # the same, to Pillow; trying each of its forty takes longer
LABEL = re.compile("[0-9]{1,5}")
ROWS_A_TASK = 64  # of threads: a task for each row would cost more than reading it


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One part of a data set. Images are decoded when asked for."""

    name: str
    classes: tuple[str, ...]
    sample_id: np.ndarray  # int64 [N]: the sample's position in its source, whatever has been left out since
    label: np.ndarray  # int64 [N]
    images: Sequence  # N of uint8 arrays [H, W, 3], encoded bytes, or paths of image files as text
    root: Path | None = None  # the folder that paths begin with, left out of fingerprints
    listed: str | None = None  # where paths are listed, up to a sample's number there, from 1: "train.txt line"

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Samples of each class, int64 [C]."""
        return np.bincount(self.label, minlength=len(self.classes))

    @cached_property
    def image_size(self) -> np.ndarray:
        """(height, width) of every image as decoded, int64 [N, 2]. Raises UserError naming the images that do not decode."""
        return np.array(self.for_each(self._size), np.int64).reshape(-1, 2)

    @cached_property
    def file_size(self) -> np.ndarray:
        """Bytes of every image's file, int64 [N]. Raises UserError naming the files that are missing."""
        return np.array(self.for_each(self._file_size, "restore them or correct data.root"), np.int64)

    def for_each(self, read: Callable[[int], object], remedy: str = "replace or remove them") -> list:
        """`read(row)` of every row, in threads. Raises one UserError for all that `read` raised, with a `remedy`."""

        def attempt(row: int):
            try:
                return read(row)
            except UserError as error:
                return error

        def some(start: int) -> list:
            return [attempt(row) for row in range(start, min(start + ROWS_A_TASK, len(self)))]

        found, start = [], time.perf_counter()
        # Decoding and waiting for a disk release the interpreter's lock.
        with Progress(f"reading {self.name}", len(self), 0, "images", plain=True) as progress, ThreadPoolExecutor() as threads:
            for part in threads.map(some, range(0, len(self), ROWS_A_TASK)):
                found += part
                progress.advance(len(found) / (time.perf_counter() - start), "images/s", len(part))
        if broken := [str(error) for error in found if isinstance(error, UserError)]:
            more = f" (and {len(broken) - 3} more)" if len(broken) > 3 else ""
            raise UserError("; ".join(broken[:3]) + f"{more}: {remedy}")
        return found

    def decode(self, row: int) -> Image.Image:
        """Image `row`, in RGB, upright. Raises UserError naming it if it cannot be read."""
        return self._open(row, draft=False)[0]

    def describe(self, row: int) -> str:
        """What a person calls the sample: its file, or its position in the source."""
        image = self.images[row]
        if not isinstance(image, str):
            return f"{self.name} sample {self.sample_id[row]}"
        return f"{image} ({self.listed} {self.sample_id[row] + 1})" if self.listed else image

    def take(self, rows: np.ndarray) -> "Dataset":
        """The samples at `rows`, in that order."""
        images = self.images[rows] if isinstance(self.images, np.ndarray) else [self.images[row] for row in rows]
        return replace(self, sample_id=self.sample_id[rows], label=self.label[rows], images=images)

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """What the data set is, by part: sha256 of sample ids, labels and images (files: their paths and sizes)."""
        images, top = hashlib.sha256(), os.path.join(self.root or "", "")
        for row, image in enumerate(self.images):
            if isinstance(image, str):
                image = f"{image.removeprefix(top)} {self.file_size[row]}\n".encode()
            images.update(image)
        return {
            "size": f"{len(self):,} samples of {len(self.classes):,} classes",
            "samples": hashlib.sha256(self.sample_id.astype("<i8").tobytes()).hexdigest(),
            "labels": hashlib.sha256(self.label.astype("<i8").tobytes()).hexdigest(),
            "images": images.hexdigest(),
        }

    def _open(self, row: int, draft: bool) -> tuple[Image.Image, tuple[int, int]]:
        """Image `row`, in RGB, upright, and its (height, width); a `draft` of it is smaller."""
        image = self.images[row]
        if isinstance(image, np.ndarray):
            return Image.fromarray(image), image.shape[:2]
        try:
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS)
            whole = image.size
            # a JPEG need not be decoded at full size to see that it is whole
            drafted = draft and image.draft("RGB", (1, 1)) is not None
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip
                image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("it holds floating-point pixels")
            width, height = (whole[::-1] if turned else whole) if drafted else image.size
            return image.convert("RGB"), (height, width)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, UnidentifiedImageError):
                error = "no known format"
            raise UserError(f"{self.describe(row)} cannot be read as an image: {error}")

    def _size(self, row: int) -> tuple[int, int]:
        return self._open(row, draft=True)[1]

    def _file_size(self, row: int) -> int:
        try:
            return os.stat(self.images[row]).st_size
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise UserError(f"{self.describe(row)} cannot be read: {getattr(error, 'strerror', error)}")


def load(section: schema.Data, shot: str | None = None, download: bool = True) -> tuple[Dataset, Dataset]:
    """The training part, made long-tailed as `section` says, and the test part, whole.

    With `shot`, a shot group of metrics.py, only the samples of its classes, in both parts; all classes keep their names
    and numbers. Raises UserError for files that are missing, labels out of range, classes without training samples and a
    group without classes.
    """
    loader = LOADERS[section.name]
    options = {"download": download} if loader is _cifar else {}
    train, test = loader(section, config.expand(section.root), **options)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))[:5]
        what = f"only one has {', '.join(map(repr, odd))}" if odd else "their order differs"
        raise UserError(f"{train.name}: the training and the test part differ in their classes: {what}")
    if not all(isinstance(name, str) for name in train.classes) or len(set(train.classes)) < len(train.classes):
        raise UserError(f"{train.name}: class names must be distinct texts; mend the names in the data's metadata")
    if odd := [name for name in train.classes if name.encode(errors="replace") != name.encode(errors="surrogatepass")]:
        raise UserError(f"{train.name}: the class name {odd[0]!r} is not UTF-8; rename it")
    if not 2 <= len(train.classes) <= MOST_CLASSES:
        raise UserError(f"{train.name} has {len(train.classes):,} classes; there must be 2 to {MOST_CLASSES:,}")
    for part, dataset in ("training", train), ("test", test):
        if not len(dataset):
            raise UserError(f"{dataset.name}: the {part} part holds no samples")
        wrong = np.flatnonzero((dataset.label < 0) | (dataset.label >= len(dataset.classes)))
        if len(wrong):
            raise UserError(
                f"{dataset.describe(wrong[0])}: label {dataset.label[wrong[0]]} is outside 0 … {len(dataset.classes) - 1}"
                f" ({len(wrong)} such samples in the {part} part)"
            )
    if section.imbalance_ratio is not None or section.max_per_class is not None:
        train = long_tailed(train, section.imbalance_ratio or 1.0, section.max_per_class, section.seed)
    if empty := [name for name, count in zip(train.classes, train.class_counts) if not count]:
        names = ", ".join(map(repr, empty[:5]))
        raise UserError(f"{train.name}: {len(empty)} classes have no training sample: {names}; leave them out of the set")
    if shot is None:
        return train, test
    members = metrics.shot_groups(train.class_counts)[shot]
    for part, dataset in ("training", train), ("test", test):
        if not members[dataset.label].any():
            raise UserError(f"{dataset.name}: the {part} part has no {shot}-shot classes; leave out their expert")
    return tuple(dataset.take(np.flatnonzero(members[dataset.label])) for dataset in (train, test))


def long_tailed_counts(classes: int, largest: int, ratio: float) -> np.ndarray:
    """n_c = int(n_max ratio^(-c / (C - 1))), int64 [C] (Cui et al., 2019, as both papers use it)."""
    return np.array([int(largest * (1 / ratio) ** (c / max(classes - 1, 1))) for c in range(classes)], np.int64)


def long_tailed(dataset: Dataset, ratio: float, largest: int | None, seed: int) -> Dataset:
    """`dataset` thinned to `long_tailed_counts`; `largest` defaults to the size of the first class.

    Which samples stay follows from `seed` and their ids alone. Raises UserError where a class has too few.
    """
    counts = long_tailed_counts(len(dataset.classes), largest or int(dataset.class_counts[0]), ratio)
    for name, wanted, found in zip(dataset.classes, counts, dataset.class_counts):
        if not 0 < wanted <= found:
            raise UserError(
                f"{dataset.name}: imbalance ratio {ratio:g} asks for {wanted} samples of class {name!r}, which has {found}; "
                f"{'raise' if wanted == 0 else 'lower'} data.max_per_class or change data.imbalance_ratio"
            )
    order = philox.permutation(seed, philox.SUBSET, dataset.sample_id)
    ranked = order[np.argsort(dataset.label[order], kind="stable")]  # by class, in random order within each
    starts = np.concatenate([[0], np.cumsum(dataset.class_counts)[:-1]])
    kept = np.concatenate([ranked[start : start + count] for start, count in zip(starts, counts)])
    return dataset.take(np.sort(kept))


def _digits(section: schema.Digits, root: Path) -> tuple[Dataset, Dataset]:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    whole = Dataset(
        name="digits",
        classes=tuple(str(name) for name in data.target_names),
        sample_id=np.arange(len(pixels)),
        label=data.target.astype(np.int64),
        images=np.repeat(pixels[..., None], 3, axis=-1),
    )
    test = np.sort(np.concatenate([np.flatnonzero(whole.label == c)[-40:] for c in range(10)]))
    return whole.take(np.setdiff1d(np.arange(len(whole)), test)), whole.take(test)


def _parquet(section: schema.Parquet, root: Path) -> tuple[Dataset, Dataset]:
    return _parquet_part(section, root, section.train), _parquet_part(section, root, section.test)


def _parquet_part(section: schema.Parquet, root: Path, pattern: str) -> Dataset:
    import pyarrow
    import pyarrow.parquet

    paths = sorted(Path(path) for path in glob.glob(str(root / pattern)))
    if not paths:
        raise UserError(f"no file matches {pattern!r} in {root}; check data.root and data.train or data.test")
    images, labels, names = [], [], None
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:  # read_table() would import pandas
                schema = file.schema_arrow
                for column in (section.image, section.label):
                    if column not in schema.names:
                        raise UserError(
                            f"{path} has no column {column!r} but {', '.join(schema.names)}; set data.image, data.label"
                        )
                table = file.read(columns=[section.image, section.label])
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read {path} as Parquet: {error}")
        image, label = table[section.image], table[section.label]
        data = image.type.field("bytes").type if pyarrow.types.is_struct(image.type) and "bytes" in image.type.names else None
        if data not in (pyarrow.binary(), pyarrow.large_binary()):
            raise UserError(f"{path}: column {section.image!r} is {image.type}, not a struct with a binary field 'bytes'")
        if not pyarrow.types.is_integer(label.type) or label.null_count:
            found = f"it is {label.type} with {label.null_count} nulls"
            raise UserError(f"{path}: column {section.label!r} must hold whole numbers without gaps; {found}")
        images += [value for chunk in image.chunks for value in chunk.field("bytes").to_pylist()]
        labels.append(np.array(label.to_pylist()).astype(np.int64))  # to_numpy() would import pandas
        found = _class_names(schema, section.label)
        if names and found != names:
            raise UserError(f"{path}: class names differ from those of {paths[0]}")
        names = found
    if missing := [row for row, value in enumerate(images) if value is None]:
        raise UserError(f"{paths[0].parent / pattern}: row {missing[0]} has no image bytes ({len(missing)} such rows)")
    label = np.concatenate(labels)
    classes = names or [str(c) for c in range(min(label.max(initial=-1), MOST_CLASSES) + 1)]
    return Dataset(
        name=paths[0].parent.name,
        classes=tuple(classes),
        sample_id=np.arange(len(label)),
        label=label,
        images=images,
    )


def _class_names(schema, label: str) -> list[str] | None:
    """The names that the Hugging Face metadata of a Parquet schema give to the column `label`, if they do."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
    except (TypeError, KeyError, ValueError):
        return None


def _cifar(section: schema.Cifar, root: Path, download: bool) -> tuple[Dataset, Dataset]:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[section.name]
    try:
        parts = [source(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if not download:
            raise UserError(f"{section.name} is not in {root}, and a dry run downloads nothing; leave out --dry-run")
        raise UserError(f"cannot load or download {section.name} into {root}: {error}")
    return tuple(
        Dataset(
            name=section.name,
            classes=tuple(part.classes),
            sample_id=np.arange(len(part.targets)),
            label=np.array(part.targets, np.int64),
            images=part.data,
        )
        for part in parts
    )


def _imagefolder(section: schema.ImageFolder, root: Path) -> tuple[Dataset, Dataset]:
    return _folder_part(root / section.train), _folder_part(root / section.test)


def _folder_part(root: Path) -> Dataset:
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; check data.root and data.train or data.test")
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    images, label = [], []
    for number, folder in enumerate(folders):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_FILES)
        images += map(str, files)
        label += [number] * len(files)
    return Dataset(
        name=root.parent.name,
        classes=tuple(folder.name for folder in folders),
        sample_id=np.arange(len(images)),
        label=np.array(label, np.int64),
        images=images,
        root=root,
    )


def _image_list(section: schema.ImageList, root: Path) -> tuple[Dataset, Dataset]:
    parts = [_read_list(root / name) for name in (section.train, section.test)]
    if section.classes:
        classes = _read(root / section.classes, "data.classes").decode(errors="replace").rstrip().splitlines()
    else:
        classes = [str(c) for c in range(max(max(label) for _, label in parts) + 1)]
    return tuple(
        _listed_part(root, f"{name} line", files, label, classes)
        for name, (files, label) in zip((section.train, section.test), parts)
    )


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """The files and labels of a list, one for every line, so that an error can name the line."""
    try:
        text = _read(path).decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}); save it as such")
    if not text:
        raise UserError(f"{path} is empty; list an image on each line: relative/path.jpg, a space and its label")
    files, labels = [], []
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.rsplit(maxsplit=1)
        if len(fields) < 2 or not LABEL.fullmatch(fields[1]):
            raise UserError(
                f"{path} line {number}: {line[:100]!r} is not a path and a label; "
                f"write relative/path.jpg, a space and a whole number from 0 to {MOST_CLASSES - 1:,}"
            )
        files.append(fields[0].lstrip())
        labels.append(int(fields[1]))
    return files, labels


class _Category(TypedDict):
    id: int
    name: NotRequired[str | int | None]


class _Image(TypedDict):
    id: int
    file_name: str


class _Annotation(TypedDict):
    image_id: int
    category_id: int


class _INaturalist(TypedDict):
    """What is read of iNaturalist's JSON; it holds more."""

    categories: Annotated[list[_Category], FailFast()]
    images: Annotated[list[_Image], FailFast()]
    annotations: Annotated[list[_Annotation], FailFast()]


def _inaturalist(section: schema.INaturalist, root: Path) -> tuple[Dataset, Dataset]:
    return _inaturalist_part(root, section.train), _inaturalist_part(root, section.test)


def _inaturalist_part(root: Path, name: str) -> Dataset:
    path = root / name
    try:
        content = TypeAdapter(_INaturalist).validate_json(_read(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path} is not iNaturalist's JSON: {place}: {first['msg']}; it must hold categories, images and annotations"
        )
    categories = sorted(content["categories"], key=lambda category: category["id"])
    files, annotations = content["images"], content["annotations"]
    number = {category["id"]: number for number, category in enumerate(categories)}
    category_of = {annotation["image_id"]: annotation["category_id"] for annotation in annotations}
    images = {image["id"] for image in files}
    wrong = {
        "category ids that come twice": _repeated(category["id"] for category in categories),
        "image ids that come twice": _repeated(image["id"] for image in files),
        "images with several annotations": _repeated(annotation["image_id"] for annotation in annotations),
        "images without an annotation": images - category_of.keys(),
        "annotated images that are not listed": category_of.keys() - images,
        "annotated categories that are not listed": set(category_of.values()) - number.keys(),
    }
    for what, ids in wrong.items():
        if ids:
            shown = ", ".join(map(str, sorted(ids)[:5]))
            raise UserError(
                f"{path} has {len(ids):,} {what}: {shown}; each image needs one annotation, with a listed category"
            )
    names = [str(category["id"] if category.get("name") is None else category["name"]) for category in categories]
    if len(set(names)) < len(names):
        names = [str(category["id"]) for category in categories]
    label = [number[category_of[image["id"]]] for image in files]
    return _listed_part(root, f"{name} image number", [image["file_name"] for image in files], label, names)


def _repeated(ids: Iterable[int]) -> list[int]:
    return [one for one, count in Counter(ids).items() if count > 1]


def _listed_part(root: Path, listed: str, files: list[str], label: list[int], classes: Sequence[str]) -> Dataset:
    """A part whose files, relative to `root`, are listed. Raises UserError for those outside of it and those missing."""
    top, images = os.path.join(root, ""), []
    for number, file in enumerate(files, 1):
        path = os.path.normpath(os.path.join(top, file))
        if not path.startswith(top):
            raise UserError(f"{listed} {number}: {file!r} is outside {root}; paths start from data.root and stay in it")
        images.append(path)
    dataset = Dataset(
        name=root.name,
        classes=tuple(classes),
        sample_id=np.arange(len(images)),
        label=np.array(label, np.int64),
        images=images,
        root=root,
        listed=listed,
    )
    _ = dataset.file_size  # asks the disk once, for what is missing now and for the fingerprint later
    return dataset


def _read(path: Path, key: str = "data.train and data.test") -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check data.root, {key}")


LOADERS = {
    "digits": _digits,
    "parquet": _parquet,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagefolder": _imagefolder,
    "image_list": _image_list,
    "inaturalist": _inaturalist,
}
