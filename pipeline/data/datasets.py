"""Data sets: the two parts that a configuration names, the long-tailed draw, and what is wrong with them.

Left out: how each kind is read (folders.py, lists.py, parquet.py), pixels (decoding.py), crops (images.py).
"""

import fcntl
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from offline_bkd.cache import philox
from offline_bkd.cache.shots import shot_groups
from offline_bkd.pipeline import UserError, config, schema, torchrun
from offline_bkd.pipeline.data.dataset import MOST_CLASSES, Dataset
from offline_bkd.pipeline.data.folders import load_folders
from offline_bkd.pipeline.data.lists import load_image_list, load_inaturalist
from offline_bkd.pipeline.show.terminal import counted


class Parts(NamedTuple):
    """What an experiment's data are, of the same classes."""

    training: Dataset
    test: Dataset
    validation: Dataset | None  # by which epochs and methods are chosen, if there is one


def load(section: schema.Data, shot: str | None = None, download: bool = True) -> Parts:
    """The training part, made long-tailed as `section` says, less what is held out of it for validation; the others whole.

    With `shot`, a shot group of cache/shots.py, only the samples of its classes, in all parts; all classes keep their names
    and numbers. Without `download`, nothing is downloaded or copied: it must be there. What is allowed, but perhaps not
    meant, is in the parts' notes, and printed. Raises UserError for files that are missing, labels out of range, classes
    without training samples and a group without classes.
    """
    loader = LOADERS[section.name]
    options = {"download": download} if loader in (_cifar, _parquet) else {}
    loaded = loader(section, config.expand(section.root), **options)
    training, *others = (part.named(name) for part, name in zip(loaded, Parts._fields))
    others = dict(zip(Parts._fields[1:], others))
    for part in (training, *others.values()):
        if part.listed:
            _ = part.file_status  # asks the disk once, for what is missing now and for the fingerprint later
    _print_notes(*training.notes, *(note for part in others.values() for note in part.notes))
    _refuse_labels(training, "training")
    for name, part in others.items():
        _refuse_classes(training, part, name)
        _refuse_labels(part, name)
    if section.imbalance_ratio is not None or section.max_per_class is not None:
        training = long_tailed(training, section.imbalance_ratio or 1.0, section.max_per_class, section.seed)
    if empty := [name for name, count in zip(training.classes, training.class_counts) if not count]:
        lowest = training.label.min()
        remedy = f"its labels begin at {lowest}: number them from 0" if lowest else "leave such classes out of the set"
        images = {name: int(part.class_counts[training.class_counts == 0].sum()) for name, part in others.items()}
        tested = [f"{counted(count, 'image')} in the {name} part" for name, count in images.items() if count]
        though = f", but with {' and '.join(tested)}" if tested else ""
        raise UserError(f"{training.name}: {_classes(empty)} without a training sample{though}: {_some(empty)}; {remedy}")
    if isinstance(section.validation, int | float):
        training, others["validation"] = hold_out(training, section.validation, section.seed)
    for name, part in others.items():
        notes = notes_on_parts(training, part, name)
        if name == "validation" and np.isin(part.image_key, others["test"].image_key).any():
            notes = (*notes, f"{part.name}: validation images are test images too, by which the best epoch is then chosen")
        _print_notes(*notes)
        others[name] = part.take(np.arange(len(part)), notes)
    if shot is not None:
        members = shot_groups(training.class_counts)[shot]
        for name, part in {"training": training, **others}.items():
            if not members[part.label].any():
                raise UserError(f"{part.name}: the {name} part has no {shot}-shot classes; leave out their expert")
        training = training.take(np.flatnonzero(members[training.label]))
        others = {name: part.take(np.flatnonzero(members[part.label])) for name, part in others.items()}
    return Parts(training, others["test"], others.get("validation"))


def _print_notes(*notes: str) -> None:
    """On the error output, for what a command prints may be read by a program; once where several processes do the same."""
    if torchrun.rank() == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr, flush=True)


def _classes(names: Sequence[str]) -> str:
    return counted(len(names), "class", "classes")


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")


def _refuse_classes(train: Dataset, other: Dataset, part: str) -> None:
    if train.classes != other.classes:
        odd = sorted(set(train.classes) ^ set(other.classes))
        what = f"only one has {_some(odd)}" if odd else "their order differs"
        raise UserError(
            f"{train.name}: the training and the {part} part differ in their classes: {what}; mend the data's names"
        )
    if len(set(train.classes)) < len(train.classes):
        twice = [name for name, count in Counter(train.classes).items() if count > 1]
        raise UserError(f"{train.name}: class names must be distinct texts, found {_some(twice)} twice; mend the data's names")
    if odd := [name for name in train.classes if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)]:
        raise UserError(f"{train.name}: the class name {odd[0]!r} is not UTF-8 that can be printed; rename it")
    if not 2 <= len(train.classes) <= MOST_CLASSES:
        raise UserError(f"{train.name} has {_classes(train.classes)}; there must be 2 to {MOST_CLASSES:,}")


def _refuse_labels(dataset: Dataset, part: str) -> None:
    if not len(dataset):
        raise UserError(f"{dataset.name}: the {part} part holds no samples")
    lowest, highest, classes = dataset.label.min(), dataset.label.max(), len(dataset.classes)
    if highest < 0:
        raise UserError(
            f"{dataset.name}: every label of the {part} part is negative, as where there are none; name labelled data"
        )
    wrong = np.flatnonzero((dataset.label < 0) | (dataset.label >= classes))
    if len(wrong):
        remedy = "number labels from 0" if lowest > 0 else "mend the labels or the class names"
        raise UserError(
            f"{dataset.describe(wrong[0])}: label {dataset.label[wrong[0]]} is outside 0 … {classes - 1} ("
            f"{counted(len(wrong), 'such sample')} in the {part} part, whose labels run from {lowest} to {highest}); {remedy}"
        )


def notes_on_parts(train: Dataset, other: Dataset, part: str) -> tuple[str, ...]:
    """What is allowed, but perhaps not meant, of two parts: classes that are not judged, images that are there twice."""
    notes = []
    if absent := [name for name, count in zip(other.classes, other.class_counts) if not count]:
        notes.append(f"{other.name}: {_classes(absent)} without a {part} image, and so without an accuracy: {_some(absent)}")
    order = np.argsort(train.image_key, kind="stable")
    key, label = train.image_key[order], train.label[order]
    twice = np.flatnonzero((key[1:] == key[:-1]) & (label[1:] != label[:-1]))
    if len(twice) and part == "test":  # it is said once
        first, second = (train.classes[label[place]] for place in (twice[0], twice[0] + 1))
        notes.append(
            f"{train.name}: {counted(len(twice), 'image')} of two labels, such as {train.describe(order[twice[0]])}: "
            f"{first!r} and {second!r}"
        )
    both = np.flatnonzero(np.isin(other.image_key, key))
    if len(both):
        notes.append(
            f"{other.name}: {counted(len(both), f'{part} image')} among the training images too, "
            f"such as {other.describe(both[0])}; its accuracy counts what was trained on"
        )
    return tuple(notes)


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
                f"{dataset.name}: imbalance ratio {ratio:g} asks for {counted(wanted, 'sample')} of class {name!r}, "
                f"which has {found}; {'raise' if wanted == 0 else 'lower'} data.max_per_class or change data.imbalance_ratio"
            )
    ranked = _ranked(dataset, seed)
    return dataset.take(np.sort(np.concatenate([rows[:count] for rows, count in zip(ranked, counts)])))


def hold_out(dataset: Dataset, held: float | int, seed: int) -> tuple[Dataset, Dataset]:
    """`dataset` without what is held out, and that: of each class a share `held` below 1, or so many samples.

    Of a share, at least one sample where a class has two, and never all. Which follows from `seed` and their ids alone.
    Raises UserError where a class has not more than the number.
    """
    counts = dataset.class_counts
    if isinstance(held, int):
        if short := [name for name, count in zip(dataset.classes, counts) if count <= held]:
            raise UserError(
                f"{dataset.name}: data.validation holds out {counted(held, 'sample')} of each class, "
                f"but there are no more of {_classes(short)}: {_some(short)}; lower it, or give a share or files"
            )
        held_counts = np.full(len(counts), held)
    else:
        held_counts = np.minimum(np.maximum(np.rint(counts * held).astype(np.int64), 1), counts - 1)
    # the last of those that a larger imbalance ratio would leave out first
    rows = [rows[len(rows) - count :] for rows, count in zip(_ranked(dataset, seed), held_counts)]
    chosen = np.sort(np.concatenate(rows))
    if not len(chosen):
        raise UserError(f"{dataset.name}: data.validation {held:g} holds out nothing of classes this small; leave it out")
    return dataset.take(np.setdiff1d(np.arange(len(dataset)), chosen)), dataset.take(chosen).named("validation")


def _ranked(dataset: Dataset, seed: int) -> list[np.ndarray]:
    """The rows of each class in a random order, which follows from `seed` and the samples' ids alone."""
    order = philox.permutation(seed, philox.SUBSET, dataset.sample_id)
    by_class = order[np.argsort(dataset.label[order], kind="stable")]
    return np.split(by_class, np.cumsum(dataset.class_counts)[:-1])


def _parquet(section: schema.Parquet, root: Path, download: bool) -> tuple[Dataset, ...]:
    from offline_bkd.pipeline.data.parquet import load_parquet  # PyArrow is large, and other sets need none

    return load_parquet(section, root, download)


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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time downloads into `folder`; the others then find what it has downloaded."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")
    except OSError:  # where nothing can be written, nothing is downloaded
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cifar(section: schema.Cifar, root: Path, download: bool) -> tuple[Dataset, Dataset]:
    from torchvision import datasets

    source = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[section.name]
    try:
        with _alone(root) if download else nullcontext():
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


LOADERS = {
    "digits": _digits,
    "parquet": _parquet,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "imagefolder": load_folders,
    "image_list": load_image_list,
    "inaturalist": load_inaturalist,
}
