"""What comes after the pooled features: the last layer, which one it is, and what may stand in its place.

Shapes: B images, D features, C classes.
"""

from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.models.oltr import Memory, SquashedCosineClassifier
from offline_bkd.pipeline.schema import Network


class CosineClassifier(nn.Module):
    """Features [B, D] to the cosines of their angles with each class's weight, times `scale`: [B, C].

    The weights [C, D] begin with the directions of points in a cube and length one (`init` "unit"), or as Glorot's uniform.
    """

    def __init__(self, inputs: int, classes: int, scale: float, init: Literal["unit", "glorot"] = "unit"):
        super().__init__()
        self.in_features, self.scale = inputs, scale
        weight = torch.empty(classes, inputs)
        weight = functional.normalize(weight.uniform_(-1, 1)) if init == "unit" else nn.init.xavier_uniform_(weight)
        self.weight = nn.Parameter(weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * functional.linear(functional.normalize(features), functional.normalize(self.weight))


class Projection(nn.Linear):
    """Features to others of the width that a section asks for, before a ReLU and the classifier."""


def classifier(model: nn.Module) -> nn.Module:
    """The last layer, whose input [B, D] (`in_features`) is the network's feature."""
    return model.get_submodule(classifier_name(model))


def classifier_name(model: nn.Module) -> str:
    """The last layer's name among the model's modules. Raises UserError where none is linear, as in a SqueezeNet."""
    named = dict(model.named_modules())
    for module in [*named.values()]:
        if hasattr(module, "get_classifier"):  # timm's networks, whose last layer need not be the last that they name
            inside = [*module.get_classifier().modules()]
            named = {name: part for name, part in named.items() if any(part is other for other in inside)}
    kinds = nn.Linear, CosineClassifier, SquashedCosineClassifier
    found = [name for name, module in named.items() if isinstance(module, kinds)]
    if not found:
        kind = type(getattr(model, "network", model)).__name__
        raise UserError(f"a {kind} has no linear last layer, whose input is its feature; choose another architecture")
    return found[-1]


def replace_classifier(network: nn.Module, section: Network, classes: int) -> None:
    """Puts the projection and the classifier that `section` asks for in the place of the last layer."""
    if section.projection is None and section.cosine_scale is None and not section.memory:
        return
    name = classifier_name(network)
    layers, inputs = [], network.get_submodule(name).in_features
    if section.projection is not None:
        layers += [Projection(inputs, section.projection), nn.ReLU()]
        nn.init.kaiming_normal_(layers[0].weight)
        inputs = section.projection
    if section.memory:
        layers.append(Memory(inputs, classes))
    elif section.cosine_scale is None:
        layers.append(nn.Linear(inputs, classes))
        nn.init.kaiming_normal_(layers[-1].weight)
    else:
        layers.append(CosineClassifier(inputs, classes, section.cosine_scale, section.cosine_init))
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Sequential(*layers))
