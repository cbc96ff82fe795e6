"""Sections of data sets, by kind."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, Strict, model_validator

from offline_bkd.pipeline.schema.base import PerChannel, Positive, PositivePerChannel, Section

HOW_READ = {"workers", "copies"}  # keys that change no result
PLACE = HOW_READ | {"root"}  # and where images are, which changes none if they are the same
PIXELS = {"mean", "std"}  # how a network sees them
DRAWN = {"imbalance_ratio", "max_per_class", "seed", "validation"}  # which of the images there are


def _validation(value):
    if value is None or isinstance(value, str):
        return value
    share, count = isinstance(value, float) and 0 < value < 1, type(value) is int and value > 0
    if not share and not count:
        raise ValueError(
            "a share of each class's training images, above 0 and below 1, a whole number of them, or the files of a "
            f"validation part; found {value!r}"
        )
    return value


class Data(Section):
    """What every data set has: where it is, how its training part is made long-tailed, how pixels are normalised."""

    root: str = "."  # folder that relative paths start from, itself from the current folder; ~ and ${VARIABLES} are expanded
    # n_max / n_min: class c of C, from 0 in their order, keeps n_max ratio^(-c / (C - 1)) samples, rounded down; null: all
    imbalance_ratio: Annotated[float, Field(ge=1)] | None = None
    max_per_class: Positive | None = None  # n_max; null takes the first class's size
    seed: Annotated[int, Strict(), Field(ge=0, lt=2**64)] = 0  # which samples stay, and which are held out
    # the part by which epochs are chosen: held out, a share of each class's training images (0.1) or so many of them (20);
    # or its own files, given as those of `test`
    validation: Annotated[int | float | str | None, BeforeValidator(_validation)] = None
    mean: PerChannel | None = None  # of pixels in [0, 1]; null: ImageNet's, or that of timm's configuration
    std: PositivePerChannel | None = None  # likewise
    workers: Annotated[int, Strict(), Field(ge=0)] = 2  # decoding processes, where images are decoded as needed

    @model_validator(mode="after")
    def _own_files(self):
        if isinstance(self.validation, str) and not hasattr(self, "test"):
            raise ValueError(
                f"{self.name} has no files to name as validation: give a share of the training images such as 0.1"
            )
        return self


class Digits(Data):
    """scikit-learn's handwritten digits: 8x8 images, 10 classes, embedded, the last 40 of each class for testing."""

    name: Literal["digits"]


class Parquet(Data):
    """Parquet in the Hugging Face layout: an image struct with `bytes` or a `path`, an integer label column."""

    name: Literal["parquet"]
    train: str  # a file or a pattern such as train-*.parquet
    test: str  # likewise
    image: str = "image"  # the column of images
    label: str = "label"  # the column of class numbers
    # a folder for the copy of the images that a part of more than 1 GiB is read from, as `root` is given; null: `copies`
    # beside its files
    copies: str | None = None


class Cifar(Data):
    """CIFAR-10 or CIFAR-100 through torchvision, downloaded into `root` where it is missing."""

    name: Literal["cifar10", "cifar100"]


class ImageFolder(Data):
    """A folder for each class, of image files; classes are the folders' sorted names."""

    name: Literal["imagefolder"]
    train: str = "train"  # the folder of the classes' folders
    test: str = "test"  # likewise


class ImageList(Data):
    """Text files of lines `relative/path.jpg label`, as ImageNet-LT and Places-LT are given; paths start from `root`."""

    name: Literal["image_list"]
    train: str  # the file
    test: str  # likewise
    classes: str | None = None  # a file with a class name on each line; null names the classes 0, 1, …


class INaturalist(Data):
    """The JSON files of iNaturalist 2017 and 2018: images, an annotation for each, categories; paths start from `root`."""

    name: Literal["inaturalist"]
    train: str  # the file
    test: str  # likewise
