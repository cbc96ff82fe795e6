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
        # in place where nothing needs what was there: the same bits, and less memory to go through
        y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)), inplace=True)))
        if self.stride > 1 or self.missing:  # option A: every other pixel, zeros for the new channels
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2))
        return functional.relu(y.add_(x), inplace=True)


class CifarResNet(nn.Module):
    """Normalised images [B, 3, H, W] to logits [B, C].

    With two branches the last block exists twice (BBN, section 4.2), and the classifier begins as torch has a linear layer,
    as in BBN's code. `zero_init_residual`: every block begins as its shortcut.
    """

    def __init__(self, depth: int, width: int, classes: int, branches: int = 1, zero_init_residual: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        shapes, inputs = [], width
        for stage in range(3):
            for position in range((depth - 2) // 6):
                outputs = width * 2**stage
                shapes.append((inputs, outputs, 2 if stage and not position else 1))
                inputs = outputs
        last = shapes.pop() if branches > 1 else None
        self.blocks = nn.Sequential(*(BasicBlock(*shape) for shape in shapes))
        if last:
            self.branches = nn.ModuleList(BasicBlock(*last) for _ in range(branches))
        self.fc = nn.Linear(branches * inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) or (module is self.fc and branches == 1):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, BasicBlock) and zero_init_residual:
                nn.init.zeros_(module.bn2.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.shared(x)
        if hasattr(self, "branches"):
            return self.fc(torch.cat([branch(x).mean((2, 3)) for branch in self.branches], dim=1))
        return self.fc(x.mean((2, 3)))

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """What comes before pooling, or before the branches: [B, 4 width, H / 4, W / 4]."""
        return self.blocks(functional.relu(self.bn1(self.conv1(x)), inplace=True))
