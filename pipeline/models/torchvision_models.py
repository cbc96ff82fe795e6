"""torchvision's classifiers by name, from scratch, from a file or from torchvision's own weights."""

import difflib

from torch import nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, Bottleneck

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.models.branches import BranchedResNet
from offline_bkd.pipeline.models.heads import classifier_name
from offline_bkd.pipeline.models.weights import given_weights
from offline_bkd.pipeline.schema import TorchvisionModel


def build_torchvision(section: TorchvisionModel, classes: int) -> nn.Module:
    """The network of `section`; given weights load into every part but a last layer of another width.

    Raises UserError for a name that torchvision does not know, for what is asked of a network that is no ResNet, and for
    weights that cannot be read or do not fit.
    """
    known = [*models.list_models(module=models), "resnet10"]
    if section.architecture not in known:
        near = difflib.get_close_matches(section.architecture, known, 3) or ["resnet50"]
        raise UserError(
            f"torchvision has no classifier {section.architecture!r}; did you mean {' or '.join(map(repr, near))}?"
        )
    if section.architecture == "resnet10":  # ImageNet-LT's; torchvision names none below 18 but has their parts
        network = models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=classes)
    else:
        network = models.get_model(section.architecture, weights=None, num_classes=classes)
    if section.zero_init_residual:
        _zero_last_scales(network, section)
    if section.weights is not None:
        _load(network, section)
    return _branched(network, section, classes) if section.branches == 2 else network


def torchvision_weights(section: TorchvisionModel) -> models.WeightsEnum:
    """torchvision's own weights that `section` names. Raises UserError if there are none of that name."""
    known = {} if section.architecture == "resnet10" else models.get_model_weights(section.architecture).__members__
    if section.weights not in known:
        there = f"{', '.join(known)} are torchvision's" if known else "torchvision has none"
        raise UserError(
            f"there are no weights {section.weights!r} of {section.architecture}; {there}; or give a .safetensors or .pth file"
        )
    return known[section.weights]


def _load(network: nn.Module, section: TorchvisionModel) -> None:
    own, last = network.state_dict(), classifier_name(network)
    state = given_weights(section, network, last, torchvision_weights(section).get_state_dict if section.downloads else None)
    unfit = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if unexpected := [key for key in unfit if key.rpartition(".")[0] != last]:
        raise UserError(f"weights {section.weights!r} do not fit {section.architecture}: {', '.join(unexpected[:3])}")
    network.load_state_dict({**own, **{key: value for key, value in state.items() if key in own and key not in unfit}})


def _branched(network: nn.Module, section: TorchvisionModel, classes: int) -> BranchedResNet:
    """The same network with its last block twice."""
    if not isinstance(network, models.ResNet):
        raise UserError(
            f"two branches are the last block of a ResNet twice, which {section.architecture} is not; "
            "choose a resnet, or leave out model.branches and method bbn"
        )
    return BranchedResNet(network, classes, drawn=section.weights is None)


def _zero_last_scales(network: nn.Module, section: TorchvisionModel) -> None:
    """Lets the blocks of a ResNet begin as their shortcuts."""
    if not isinstance(network, models.ResNet):
        raise UserError(f"model.zero_init_residual is for a ResNet, which {section.architecture} is not; leave it out")
    for block in network.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            nn.init.zeros_((block.bn3 if isinstance(block, Bottleneck) else block.bn2).weight)
