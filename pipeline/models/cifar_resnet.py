"""ResNets for small images (He et al., 2016, section 4.2), as long-tailed CIFAR experiments use them.

Depth 6n + 2: three stages of n basic blocks at widths w, 2w, 4w. Shortcuts without parameters (option A), Kaiming-normal
weights, a linear classifier on the pooled features.
"""

import torch
from torch import nn
from torch.nn import functional


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.missing:  # option A: every other pixel, zeros for the new channels
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        return functional.relu(x + y)


class CosineClassifier(nn.Module):
    """Features [B, D] to the cosines of their angles with each class's weight, [B, C]."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, inputs))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return functional.linear(functional.normalize(features), functional.normalize(self.weight))


class CifarResNet(nn.Module):
    """Normalised images [B, 3, H, W] to logits [B, C]."""

    def __init__(self, depth: int, width: int, classes: int, classifier: str = "linear"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(3):
            for position in range((depth - 2) // 6):
                outputs = width * 2**stage
                blocks.append(BasicBlock(inputs, outputs, 2 if stage and not position else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(inputs, classes) if classifier == "linear" else CosineClassifier(inputs, classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, CosineClassifier)):
                nn.init.kaiming_normal_(module.weight)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Pooled features [B, 4 width]."""
        return self.blocks(functional.relu(self.bn1(self.conv1(x)))).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x))
