"""Data sets as folders: one for each class, of image files, as torchvision reads them."""

import difflib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.data.dataset import Dataset, part_names
from offline_bkd.pipeline.data.decoding import SUFFIXES
from offline_bkd.pipeline.show.terminal import counted, printable

OURS = "config.yaml", "zarr.json"  # of a run and of a cache, whose pictures and chunks would become a class


def load_folders(section: schema.ImageFolder, root: Path) -> tuple[Dataset, ...]:
    """The parts. The classes are the training part's folders, some of which the others may lack."""
    places = [root / name for name in part_names(section)]
    parts = [_read_part(place) for place in places]
    classes = sorted(parts[0][0])
    for place, (files, _) in zip(places, parts):
        if extra := sorted(files.keys() - parts[0][0].keys()):
            names = ", ".join(map(repr, extra[:5]))
            near = difflib.get_close_matches(extra[0], classes, 1)
            remedy = f"is it {near[0]!r}? rename it" if near else "add training images, or take the folders away"
            raise UserError(
                f"{printable(str(place))} has {counted(len(extra), 'class', 'classes')} that the training part lacks: "
                f"{names}; {remedy}"
            )
    return tuple(_part(place, classes, *part) for place, part in zip(places, parts))


def _read_part(root: Path) -> tuple[dict[str, list[str]], Counter]:
    """The image files of each class folder, in their order, and how many files of which kind are none."""
    if not root.is_dir():
        raise UserError(
            f"there is no folder {printable(str(root))}; check data.root and data.train, data.test or data.validation"
        )
    left_out, files = Counter(), {}
    for entry in _entries(str(root)):
        if not _is_folder(entry):
            left_out["outside of a class's folder"] += 1
        elif entry.name.startswith("."):
            left_out["hidden"] += _count(entry.path)
        elif any(os.path.lexists(os.path.join(entry.path, name)) for name in OURS):
            raise UserError(
                f"{printable(entry.path)} stands among the folders of classes, but is a run or a cache; move it elsewhere"
            )
        else:
            files[entry.name] = _files_below(entry.path, left_out)
    if not any(files.values()):
        raise UserError(
            f"{printable(str(root))} has no image in a class's folder; put the images of each class into a folder of its own, "
            "named as the class"
        )
    return files, left_out


def image_files(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """The image files in `folder` and the folders in it, in their order, and a note where others are left out.

    Raises UserError for a folder that cannot be read.
    """
    left_out: Counter = Counter()
    return _files_below(str(folder), left_out), _notes(folder, left_out)


def _files_below(folder: str, left_out: Counter) -> list[str]:
    files: list[str] = []
    _walk(folder, files, left_out)
    return sorted(files, key=lambda path: path.split(os.sep))


def _walk(folder: str, files: list[str], left_out: Counter) -> None:
    """Adds the image files in `folder` to `files`, and counts the others. Links to folders are followed."""
    for entry in _entries(folder):
        if entry.name.startswith("."):
            left_out["hidden"] += _count(entry.path)
        elif _is_folder(entry):
            if entry.is_symlink() and f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(entry.path)}/"):
                left_out["linked to a folder above it"] += 1
            else:
                _walk(entry.path, files, left_out)
        elif (suffix := os.path.splitext(entry.name)[1].lower()) in SUFFIXES:
            files.append(entry.path)
        else:
            left_out[suffix or "without a suffix"] += 1


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot read the folder {printable(folder)}: {error.strerror}; correct it or remove it")


def _count(path: str) -> int:
    """The files at and below `path`."""
    if os.path.islink(path) or not os.path.isdir(path):
        return 1
    return sum(len(files) for _, _, files in os.walk(path))


def _part(root: Path, classes: list[str], files: dict[str, list[str]], left_out: Counter) -> Dataset:
    images = [path for name in classes for path in files.get(name, [])]
    label = [number for number, name in enumerate(classes) for _ in files.get(name, [])]
    return Dataset(
        name=printable(root.parent.name),
        classes=tuple(classes),
        sample_id=np.arange(len(images)),
        label=np.array(label, np.int64),
        images=images,
        root=root,
        notes=_notes(root, left_out),
    )


def _notes(root: Path, left_out: Counter) -> tuple[str, ...]:
    """One on the files below `root` that are left out, if there are any."""
    left_out = +left_out  # without kinds of which there are none
    if not left_out:
        return ()
    counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in counts[:8])
    images = ", ".join(sorted(SUFFIXES))
    return (f"{printable(str(root))}: {counted(left_out.total(), 'file')} left out ({kinds}); images are {images}",)
