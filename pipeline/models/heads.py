"""What comes after the pooled features: the last layer, which one it is, and what may stand in its place.

Shapes: B images, D features, C classes.
"""

from torch import nn

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.models.classifiers import CosineClassifier, LinearClassifier, SquashedCosineClassifier
from offline_bkd.pipeline.models.oltr import Memory
from offline_bkd.pipeline.schema import Network


class Projection(nn.Linear):
    """Features to others of the width that a section asks for, before a ReLU and the classifier."""


def classifier(model: nn.Module) -> nn.Module:
    """The last layer, whose input [B, D] (`in_features`) is the network's feature."""
    return model.get_submodule(classifier_name(model))


def classifier_name(model: nn.Module) -> str:
    """The last layer's name among the model's modules. Raises UserError where none is linear, as in a SqueezeNet."""
    if not (names := _classifiers(model)):
        kind = type(getattr(model, "network", model)).__name__
        raise UserError(f"a {kind} has no linear last layer, whose input is its feature; choose another architecture")
    return names[-1]


def _classifiers(model: nn.Module) -> list[str]:
    """The names of the modules that may be the last layer."""
    named = dict(model.named_modules())
    for module in [*named.values()]:
        if hasattr(module, "get_classifier"):  # timm's networks, whose last layer need not be the last that they name
            inside = [*module.get_classifier().modules()]
            named = {name: part for name, part in named.items() if any(part is other for other in inside)}
    kinds = nn.Linear, CosineClassifier, SquashedCosineClassifier
    return [name for name, module in named.items() if isinstance(module, kinds)]


def give_classifier(network: nn.Module, section: Network, classes: int) -> None:
    """Makes the last layer the classifier that `section` asks for, after its projection, or else a `LinearClassifier`."""
    if section.projection is None and section.cosine_scale is None and not section.memory:
        own = [network.get_submodule(name) for name in _classifiers(network)[-1:]]
        if own and type(own[0]) is nn.Linear:
            own[0].__class__ = LinearClassifier  # the same layer, under every name that the network has for it
        return
    name = classifier_name(network)
    layers, inputs = [], network.get_submodule(name).in_features
    if section.projection is not None:
        layers += [Projection(inputs, section.projection), nn.ReLU()]
        if section.cosine_init == "glorot":  # as CBD's code begins each layer; those of OLTR and LFME begin it as torch does
            nn.init.xavier_uniform_(layers[0].weight)
            nn.init.zeros_(layers[0].bias)
        inputs = section.projection
    if section.memory:
        layers.append(Memory(inputs, classes))
    elif section.cosine_scale is None:
        layers.append(LinearClassifier(inputs, classes))
        nn.init.kaiming_normal_(layers[-1].weight)
    else:
        layers.append(CosineClassifier(inputs, classes, section.cosine_scale, section.cosine_init))
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Sequential(*layers))
