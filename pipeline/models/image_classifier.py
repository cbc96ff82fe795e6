"""What wraps every network: normalisation before it, and for experts a mask after it."""

import torch
from torch import nn

from offline_bkd.pipeline.schema import PerChannel


class ImageClassifier(nn.Module):
    """uint8 images [B, 3, H, W] to logits, float32 [B, C]: normalise, then the network.

    The mean and the standard deviation are buffers: a checkpoint is whole, the crop's zero padding is black before
    normalising, and two networks that see their pixels differently have different digests. An expert answers for some
    classes alone: `members`, bool [C], a buffer too; the logits of the others are -inf. Weights, images and so activations
    have one memory format: channels-last, or contiguous.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: PerChannel,
        std: PerChannel,
        members: torch.Tensor | None = None,
        channels_last: bool = True,
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
