"""Sections of networks, by kind."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, Strict, model_validator

from offline_bkd.pipeline.schema.base import Fraction, Positive, Section


class Network(Section):
    """What every network may have at its end."""

    projection: Positive | None = None  # a layer (linear, ReLU) of this width before the classifier
    cosine_scale: Annotated[float, Field(gt=0)] | None = None  # null: a linear classifier; a number: s of a cosine classifier
    # the first weights of a cosine classifier: unit, each of length one (LDAM's code); glorot, Glorot's uniform, for a
    # projection too (CBD's code). Longer weights learn more slowly
    cosine_init: Literal["unit", "glorot"] = "unit"
    zero_init_residual: bool = False  # a ResNet's blocks begin as their shortcuts: the last scale of each is zero (CBD's code)
    memory: bool = False  # OLTR's modulated attention before pooling and memory of class centroids after it
    branches: Literal[1, 2] = 1  # 2: a ResNet's last block exists twice, for method bbn

    @property
    def downloads(self) -> bool:
        """Whether its initial weights come over the network."""
        return False

    def without_weights(self) -> Self:
        """The same network, its initial weights drawn instead of loaded."""
        return self


class CifarResNet(Network):
    """He et al.'s ResNets for small images, depth 6n + 2, with parameter-free (option A) shortcuts."""

    name: Literal["cifar_resnet"]
    depth: Positive = 32  # layers
    width: Annotated[int, Strict(), Field(ge=2, multiple_of=2)] = 16  # channels of the first stage

    @model_validator(mode="after")
    def _depth(self):
        if self.depth % 6 != 2 or self.depth < 8:
            raise ValueError(f"depth is 6n + 2 (8, 14, 20, 32, 44, 56, 110); found {self.depth}")
        return self


class LibraryModel(Network):
    """A network that a library knows by its name."""

    architecture: str  # the name in the library
    weights: str | None = None  # initial ones: a local .pth or .safetensors file, or the library's own, downloaded

    @property
    def downloads(self) -> bool:
        """Whether `weights` are the library's own; files have a suffix."""
        return self.weights is not None and not Path(self.weights).suffix

    def without_weights(self) -> Self:
        return self.model_copy(update={"weights": None})


class TorchvisionModel(LibraryModel):
    """Any of torchvision's classifiers, by its name there, and resnet10, which is ImageNet-LT's.

    Its own weights have names, such as IMAGENET1K_V1; DEFAULT is the newest.
    """

    name: Literal["torchvision"]

    @model_validator(mode="after")
    def _drawn_or_loaded(self):
        if self.weights is not None and self.zero_init_residual:
            raise ValueError("weights say how blocks begin; leave out zero_init_residual, or the weights")
        return self


class TimmModel(LibraryModel):
    """Any of timm's classifiers, by its name there: vit_tiny_patch16_224, or with the tag of its configuration and weights.

    Its own weights are DEFAULT, from the hub that timm knows. What is null follows timm's configuration.
    """

    name: Literal["timm"]
    input_size: Positive | None = None  # side of its images in pixels, for an architecture that is built for one size
    patch_size: Positive | None = None  # pixels
    drop_path: Fraction | None = None  # how often a block is left out in training, at the last one

    @model_validator(mode="after")
    def _no_resnet_of_ours(self):
        if self.memory or self.branches != 1:
            raise ValueError(
                "memory and branches change the last stage of a ResNet of cifar_resnet or torchvision; timm's stay whole"
            )
        if self.zero_init_residual:
            raise ValueError("timm's ResNets begin as their shortcuts by themselves; leave out zero_init_residual")
        return self


Model = Annotated[CifarResNet | TorchvisionModel | TimmModel, Field(discriminator="name")]
