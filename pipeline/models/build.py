"""From a section of the configuration to a network with its initial weights."""

import math

import torch
from torch import nn

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.models.cifar_resnet import CifarResNet
from offline_bkd.pipeline.models.heads import Projection, classifier, classifier_name, give_classifier
from offline_bkd.pipeline.models.image_classifier import ImageClassifier
from offline_bkd.pipeline.models.oltr import Memory, ModulatedAttention

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of pixels in [0, 1]


def build_model(
    section: schema.Model,
    classes: int,
    data: schema.Data,
    seed: int,
    image_size: tuple[int, int] | None = None,
    members: torch.Tensor | None = None,
    channels_last: bool = True,
) -> ImageClassifier:
    """A network with `classes` outputs, its initial weights drawn from `seed` alone.

    `image_size`: (height, width), which a network with a memory is made for, and those that take one size are checked for.
    `members`: bool [C], the classes that an expert answers for. `channels_last`: the memory format.

    Raises UserError where `section` asks for what cannot be built or loaded.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _build_network(section, classes, image_size)
        if section.memory:
            _add_attention(network, section, image_size)
        give_classifier(network, section, classes)
    own = getattr(network, "pretrained_cfg", IMAGENET)  # timm's
    return ImageClassifier(network, data.mean or own["mean"], data.std or own["std"], members, channels_last)


def refuse_unknown_weights(section: schema.LibraryModel) -> None:
    """Raises UserError if the weights that a section would download are not known by that name. Downloads nothing."""
    if isinstance(section, schema.TimmModel):
        from offline_bkd.pipeline.models.timm_models import refuse_unknown_timm_weights

        refuse_unknown_timm_weights(section)
    else:
        from offline_bkd.pipeline.models.torchvision_models import torchvision_weights

        torchvision_weights(section)


def memory(model: nn.Module) -> Memory:
    """The memory of a network that has one."""
    return model.get_submodule(_names(model, Memory)[0])


def new_parts(model: nn.Module, backbone: nn.Module | None = None) -> list[str]:
    """The names of the modules that no backbone gives: the last layer, what OLTR adds, a projection.

    Of `backbone` a projection is taken, unless it has none and the model has a memory: OLTR's code then draws the layer.
    """
    taken = backbone is not None and (_names(backbone, Projection) or not _names(model, Memory))
    kinds = (ModulatedAttention, Memory) if taken else (ModulatedAttention, Memory, Projection)
    return [classifier_name(model), *_names(model, *kinds)]


def head_parts(model: nn.Module) -> list[str]:
    """The names of the modules that learn at the full rate: the last layer and a projection, or OLTR's memory alone.

    In OLTR's public code attention and projection are parts of the feature model, and learn as it does.
    """
    return _names(model, Memory) or [classifier_name(model), *_names(model, Projection)]


def _names(model: nn.Module, *kinds: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _build_network(section: schema.Model, classes: int, image_size: tuple[int, int] | None) -> nn.Module:
    if isinstance(section, schema.CifarResNet):
        return CifarResNet(section.depth, section.width, classes, section.branches, section.zero_init_residual)
    if isinstance(section, schema.TimmModel):  # these libraries take seconds to import
        from offline_bkd.pipeline.models.timm_models import build_timm

        return build_timm(section, classes, image_size)
    from offline_bkd.pipeline.models.torchvision_models import build_torchvision

    return build_torchvision(section, classes)


def _add_attention(network: nn.Module, section: schema.Model, image_size: tuple[int, int]) -> None:
    """Lets the last stage of a ResNet end in modulated attention."""
    if isinstance(section, schema.CifarResNet):
        stage, stride = network.blocks, 4
    elif hasattr(network, "layer4"):
        stage, stride = network.layer4, 32
    else:
        raise UserError(
            f"a memory's attention follows the last stage of a ResNet, which {section.architecture} is not; "
            "choose a resnet, or leave out model.memory"
        )
    stage.append(ModulatedAttention(classifier(network).in_features, *(math.ceil(side / stride) for side in image_size)))
