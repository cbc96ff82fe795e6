"""Data sets whose files are listed: text lists as of ImageNet-LT and Places-LT, JSON as of iNaturalist."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, NotRequired

import numpy as np
from pydantic import FailFast, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from offline_bkd.pipeline import UserError, schema, yaml_files
from offline_bkd.pipeline.data.dataset import MOST_CLASSES, Dataset, numbered_classes, part_names
from offline_bkd.pipeline.show.terminal import printable

MOST_BYTES = 2**30  # of a list
LABEL = re.compile("[0-9]{1,5}")


def load_image_list(section: schema.ImageList, root: Path) -> tuple[Dataset, ...]:
    names = part_names(section)
    parts = [_read_list(root / name) for name in names]
    classes = _read_classes(root / section.classes) if section.classes else numbered_classes(*(label for _, label in parts))
    return tuple(listed_part(root, f"{name} line", files, label, classes) for name, (files, label) in zip(names, parts))


def _read_list(path: Path) -> tuple[list[str], list[int]]:
    """The files and labels of a list, one for every line, so that an error can name the line."""
    text = _read(path).rstrip()
    if not text:
        raise UserError(f"{path} is empty; list an image on each line: relative/path.jpg, a space and its label")
    files, labels = [], []
    for number, line in enumerate(text.split("\n"), 1):
        fields = line.rsplit(maxsplit=1)
        if not fields:
            raise UserError(f"{path} line {number} is empty; remove it, for samples are numbered by their lines")
        if len(fields) < 2 or not LABEL.fullmatch(fields[1]):
            raise UserError(
                f"{path} line {number}: {line[:100]!r} is not a path and a label; "
                f"write relative/path.jpg, a space and a whole number from 0 to {MOST_CLASSES - 1:,}"
            )
        files.append(fields[0].lstrip())
        labels.append(int(fields[1]))
    return files, labels


def _read_classes(path: Path) -> list[str]:
    names = [line.strip() for line in _read(path, "data.classes").rstrip().split("\n")]
    if "" in names:
        raise UserError(f"{path} line {names.index('') + 1} is empty; name a class on each line")
    return names


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


def load_inaturalist(section: schema.INaturalist, root: Path) -> tuple[Dataset, ...]:
    return tuple(_inaturalist_part(root, name) for name in part_names(section))


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
    return listed_part(root, f"{name} image number", [image["file_name"] for image in files], label, names)


def _repeated(ids: Iterable[int]) -> list[int]:
    return [one for one, count in Counter(ids).items() if count > 1]


def listed_part(root: Path, listed: str, files: list[str], label: list[int], classes: Sequence[str]) -> Dataset:
    """A part whose files, relative to `root`, are listed. Raises UserError for those outside of it."""
    top, images = os.path.join(root, ""), []
    for number, file in enumerate(files, 1):
        path = os.path.normpath(os.path.join(top, file))
        if not path.startswith(top):
            raise UserError(f"{listed} {number}: {file!r} is outside {root}; paths start from data.root and stay in it")
        images.append(path)
    return Dataset(
        name=printable(root.name),
        classes=tuple(classes),
        sample_id=np.arange(len(images)),
        label=np.array(label, np.int64),
        images=images,
        root=root,
        listed=listed,
    )


def _read(path: Path, key: str = "data.train, data.test and data.validation") -> str:
    try:
        return yaml_files.read_text(path, MOST_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {printable(str(path))}: {error.strerror}; check data.root, {key}")
