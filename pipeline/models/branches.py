"""A torchvision ResNet of two branches (BBN, Zhou et al., 2020, section 4.2); that of a CifarResNet is its own."""

import copy
from collections import OrderedDict

import torch
from torch import nn
from torchvision.models import ResNet


class BranchedResNet(nn.Module):
    """A ResNet of torchvision whose last block exists twice: normalised images [B, 3, H, W] to logits [B, C].

    `shared`, `branches` and `fc` are what they are in a CifarResNet of two branches. Both branches begin as the block that
    `network` ends in, or, where its weights are drawn, not loaded, the second with a draw of its own.
    """

    def __init__(self, network: ResNet, classes: int, drawn: bool):
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
