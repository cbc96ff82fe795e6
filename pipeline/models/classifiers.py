"""Last layers: features [B, D] to logits [B, C], in float32 also where all before it is in bfloat16.

bfloat16 has three digits. Of a hundred images the best two logits of one or two would tie, and of tied classes the first
counts as predicted: in long-tailed data often the more frequent. A last layer is too small a part of the work to gain from it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

SCALE = 16  # of OLTR's logits


def in_float32(forward: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Of a layer's `forward` one that autocast does not touch."""

    @functools.wraps(forward)
    def run(self, features: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(features.device.type):
            return forward(self, features)
        with torch.autocast(features.device.type, enabled=False):
            return forward(self, features.float())

    return run


class LinearClassifier(nn.Linear):
    """A linear layer whose outputs are logits."""

    forward = in_float32(nn.Linear.forward)


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

    @in_float32
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.scale * functional.linear(functional.normalize(features), functional.normalize(self.weight))


class SquashedCosineClassifier(nn.Module):
    """Features x [B, D] to SCALE * |x| / (1 + |x|) times the cosines of their angles with each class's weight: [B, C].

    OLTR's (Liu et al., 2019, section 3.1).
    """

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.in_features = inputs
        self.weight = nn.Parameter(torch.empty(classes, inputs).uniform_(-(inputs**-0.5), inputs**-0.5))

    @in_float32
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        squashed = features / (1 + features.norm(dim=1, keepdim=True))
        return SCALE * functional.linear(squashed, functional.normalize(self.weight))
