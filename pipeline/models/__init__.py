"""Networks: uint8 images in, logits out, normalisation inside, so that a checkpoint is whole."""

import copy
import difflib
import math
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.models.cifar_resnet import CifarResNet
from offline_bkd.pipeline.models.oltr import Memory, ModulatedAttention, SquashedCosineClassifier


class Classifier(nn.Module):
    """uint8 images [B, 3, H, W] to logits, float32 [B, C]: normalise, then the network.

    The mean and the standard deviation are buffers: the crop's zero padding is black before normalising,
    and two networks that see their pixels differently have different digests. So is, where an expert answers for some
    classes alone, which ones: `members`, bool [C]; the logits of the others are -inf. Weights, images and so activations have
    one memory format: channels-last, or contiguous.
    """

    def __init__(
        self, network: nn.Module, mean: tuple, std: tuple, members: torch.Tensor | None = None, channels_last: bool = True
    ):
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self.register_buffer("members", members)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.network(self.normalise(images)).float()
        return logits if self.members is None else logits.masked_fill(~self.members, -torch.inf)


class CosineClassifier(nn.Module):
    """Features [B, D] to the cosines of their angles with each class's weight, times `scale`: [B, C]."""

    def __init__(self, inputs: int, classes: int, scale: float):
        super().__init__()
        self.in_features, self.scale = inputs, scale
        self.weight = nn.Parameter(nn.init.kaiming_normal_(torch.empty(classes, inputs)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * functional.linear(functional.normalize(features), functional.normalize(self.weight))


class BranchedResNet(nn.Module):
    """A ResNet of torchvision whose last block exists twice (BBN): normalised images [B, 3, H, W] to logits [B, C].

    `shared`, `branches` and `fc` are what they are in a CifarResNet of two branches. Both branches begin as the block that
    `network` ends in, or, if it was `drawn`, the second with a draw of its own.
    """

    def __init__(self, network: nn.Module, classes: int, drawn: bool):
        super().__init__()
        first = network.layer4.pop(-1)
        second = copy.deepcopy(first)
        for layer in second.modules() if drawn else ():
            if isinstance(layer, nn.Conv2d):  # as torchvision draws them; the rest begins constant
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.shared = nn.Sequential(OrderedDict(list(network.named_children())[:-2]))  # all before avgpool and fc
        self.branches = nn.ModuleList([first, second])
        self.fc = nn.Linear(2 * network.fc.in_features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(x)
        return self.fc(torch.cat([branch(x).mean((2, 3)) for branch in self.branches], dim=1))


def build_model(
    section: schema.Model,
    classes: int,
    data: schema.Data,
    seed: int,
    image_size: tuple[int, int] | None = None,
    members: torch.Tensor | None = None,
    channels_last: bool = True,
) -> Classifier:
    """A network with `classes` outputs, its initial weights drawn from `seed` alone.

    `image_size`: (height, width), which a network with a memory is made for. `members`: bool [C], the classes that an
    expert answers for. `channels_last`: the memory format.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if section.name == "cifar_resnet":
            network = CifarResNet(section.depth, section.width, classes, section.branches)
        else:
            network = _torchvision(section, classes)
            if section.branches == 2:
                network = _branch(network, section, classes)
        if section.memory:
            _attend(network, section, image_size)
        _fit_head(network, section, classes)
    return Classifier(network, data.mean, data.std, members, channels_last)


def classifier(model: nn.Module) -> nn.Module:
    """The last layer, whose input [B, D] (`in_features`) is the network's feature."""
    return model.get_submodule(classifier_name(model))


def classifier_name(model: nn.Module) -> str:
    """The last layer's name among the model's modules."""
    return _names(model, nn.Linear, CosineClassifier, SquashedCosineClassifier)[-1]


def memory(model: nn.Module) -> Memory:
    """The memory of a network that has one."""
    return model.get_submodule(_names(model, Memory)[0])


def new_parts(model: nn.Module) -> list[str]:
    """The names of the modules that a backbone leaves out: the last layer, and what OLTR adds."""
    return [classifier_name(model), *_names(model, ModulatedAttention, Memory)]


def _names(model: nn.Module, *kinds: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _branch(network: nn.Module, section: schema.TorchvisionModel, classes: int) -> BranchedResNet:
    """The same network with its last block twice."""
    from torchvision.models import ResNet

    if not isinstance(network, ResNet):
        raise UserError(
            f"two branches are the last block of a ResNet twice, which {section.architecture} is not; "
            "choose a resnet, or leave out model.branches and method bbn"
        )
    return BranchedResNet(network, classes, drawn=section.weights is None)


def _attend(network: nn.Module, section: schema.Network, image_size: tuple[int, int]) -> None:
    """Lets the last stage of a ResNet end in modulated attention."""
    stage, stride = (network.blocks, 4) if section.name == "cifar_resnet" else (getattr(network, "layer4", None), 32)
    if stage is None:
        raise UserError(
            f"a memory's attention follows the last stage of a ResNet, which {section.architecture} is not; "
            "choose a resnet, or leave out model.memory"
        )
    stage.append(ModulatedAttention(classifier(network).in_features, *(math.ceil(side / stride) for side in image_size)))


def _fit_head(network: nn.Module, section: schema.Network, classes: int) -> None:
    """Puts what `section` asks for after the pooled features in the place of the last layer."""
    if section.projection is None and section.cosine_scale is None and not section.memory:
        return
    name = classifier_name(network)
    layers, inputs = [], network.get_submodule(name).in_features
    if section.projection is not None:
        layers += [nn.Linear(inputs, section.projection), nn.ReLU()]
        nn.init.kaiming_normal_(layers[0].weight)
        inputs = section.projection
    if section.memory:
        layers.append(Memory(inputs, classes))
    elif section.cosine_scale is None:
        layers.append(nn.Linear(inputs, classes))
        nn.init.kaiming_normal_(layers[-1].weight)
    else:
        layers.append(CosineClassifier(inputs, classes, section.cosine_scale))
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Sequential(*layers))


def _torchvision(section: schema.TorchvisionModel, classes: int) -> nn.Module:
    """torchvision's classifier; given weights load into every part but a last layer of another width."""
    from torchvision import models

    known = [*models.list_models(module=models), "resnet10"]
    if section.architecture not in known:
        near = difflib.get_close_matches(section.architecture, known, 3) or ["resnet50"]
        raise UserError(
            f"torchvision has no classifier {section.architecture!r}; did you mean {' or '.join(map(repr, near))}?"
        )
    if section.architecture == "resnet10":  # ImageNet-LT's; torchvision names none below 18 but has their parts
        network = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes)
    else:
        network = models.get_model(section.architecture, weights=None, num_classes=classes)
    if section.weights is None:
        return network
    state = _load_weights(section)
    own = network.state_dict()
    unfit = [key for key in own if key not in state or state[key].shape != own[key].shape]
    last = classifier_name(network)
    if unexpected := [key for key in unfit if key.rpartition(".")[0] != last]:
        raise UserError(f"weights {section.weights!r} do not fit {section.architecture}: {', '.join(unexpected[:3])}")
    network.load_state_dict({**own, **{key: value for key, value in state.items() if key in own and key not in unfit}})
    return network


def own_weights(section: schema.TorchvisionModel):
    """torchvision's own weights that `section` names. Raises UserError if there are none of that name."""
    from torchvision import models

    known = {} if section.architecture == "resnet10" else models.get_model_weights(section.architecture).__members__
    if section.weights not in known:
        there = f"{', '.join(known)} are torchvision's" if known else "torchvision has none"
        raise UserError(
            f"there are no weights {section.weights!r} of {section.architecture}; {there}; or give a .safetensors or .pth file"
        )
    return known[section.weights]


def _load_weights(section: schema.TorchvisionModel) -> dict:
    from safetensors.torch import load_file

    own = own_weights(section) if section.downloads else None
    try:
        if own:
            return own.get_state_dict(progress=False)
        path = Path(section.weights).expanduser()
        return load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what, found = f"{section.weights} of {section.architecture}", f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"cannot load weights {what} ({found}); give a .safetensors or .pth state dict")
