"""Random colour changes on the training device, each image by its own draw."""

from typing import NamedTuple

import torch
from torch import nn


class Strength(NamedTuple):
    brightness: float  # the largest change of the factor, up or down
    contrast: float
    saturation: float
    hue: float  # the largest turn, of whole turns
    probability: float  # that an image is changed at all
    grey: float  # the probability that it is grey


STRENGTHS = {
    "mild": Strength(0.4, 0.4, 0.4, 0.0, 1.0, 0.0),  # of the public code of cRT, OLTR and LFME for ImageNet-LT and Places-LT
    "strong": Strength(0.8, 0.8, 0.8, 0.2, 0.8, 0.2),  # SimCLR's at strength 1, as CBD has it
}


class ColorJitter(nn.Module):
    """A network that sees its training images jittered in colour, and sometimes grey; in evaluation mode as they are.

    Draws from torch's generator of the images' device, which training seeds every epoch. Brightness, contrast,
    saturation and hue are changed in this order.
    """

    def __init__(self, network: nn.Module, strength: str):
        super().__init__()
        self.network, self.strength = network, STRENGTHS[strength]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(self.jitter(images) if self.training else images)

    def jitter(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] to uint8 of the same shape."""
        count, device = len(images), images.device
        draws = torch.rand(6, count, 1, 1, 1, device=device)
        factors = [1 + strength * (2 * draw - 1) for draw, strength in zip(draws, self.strength[:3])]
        turn = self.strength.hue * (2 * draws[3] - 1)
        plain = images.float() / 255
        changed = adjust(plain, *factors, turn)
        changed = torch.where(draws[4] < self.strength.probability, changed, plain)
        changed = torch.where(draws[5] < self.strength.grey, luma(changed), changed)
        return (changed * 255).round().to(torch.uint8).contiguous(memory_format=torch.channels_last)


def luma(images: torch.Tensor) -> torch.Tensor:
    """Grey [B, 1, H, W] of images [B, 3, H, W]."""
    red, green, blue = images.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def adjust(images: torch.Tensor, brightness, contrast, saturation, turn) -> torch.Tensor:
    """Images in [0, 1] with their factors, each [B, 1, 1, 1], applied; `turn` is the hue's, in whole turns."""
    images = (images * brightness).clamp(0, 1)
    mean = luma(images).mean((1, 2, 3), keepdim=True)
    images = (mean + contrast * (images - mean)).clamp(0, 1)
    grey = luma(images)
    images = (grey + saturation * (images - grey)).clamp(0, 1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = images.split(1, dim=1)
    safe = chroma.clamp_min(1e-12)
    # hue in sixths of a turn, from the channel that is largest
    hue = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    # each channel, from red to blue, falls by the chroma with its distance, in sixths, from where it is full
    place = torch.cat([offset + hue + 6 * turn for offset in (5, 3, 1)], dim=1) % 6
    return value - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
