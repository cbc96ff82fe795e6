"""What a method is given and what it gives. Shapes: N samples, B a batch, C classes, D features."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from offline_bkd.pipeline.data.images import Batch, ImageSource
from offline_bkd.pipeline.training import losses, samplers
from offline_bkd.pipeline.training.targets import Targets


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """What a step minimises: the mean of `loss` over the batch, weighted where there are weights."""

    loss: torch.Tensor  # float32 [B]
    correct: torch.Tensor  # bool or float [B]: whether the training image was classified rightly
    weight: torch.Tensor | None = None  # float32 [B]; the mean is then sum(weight * loss) / sum(weight)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)  # [B] each: terms of the loss, to be reported

    def mean(self) -> torch.Tensor:
        """What is minimised."""
        if self.weight is None:
            return self.loss.mean()
        return (self.weight * self.loss).sum() / self.weight.sum()


class Method(Protocol):
    """How a network is trained; made from the method's settings and a Context.

    One that does not train all of the model has a static `freeze` too, of settings and model, which gives the network to run.
    """

    network: nn.Module  # images, uint8 [B, 3, H, W], to what `loss` takes; has the model's parameters, perhaps some frozen

    def rows(self, epoch: int) -> np.ndarray:
        """The positions in the training set that an epoch visits, in order: int64 [M]. Pure: asked for ahead of its turn."""

    def loss(self, output: Any, batch: Batch, epoch: int) -> StepLoss:
        """Of what `network` answered to `batch`."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may build on."""

    model: nn.Module  # the network that is saved and evaluated: images to logits [B, C]
    sample_id: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N]
    class_counts: np.ndarray  # int64 [C]
    targets: Targets | None  # of the cache, where the method learns from one
    epochs: int
    seed: int
    device: torch.device
    images: ImageSource | None = None  # of the training part
    backbone: nn.Module | None = None  # the other run's network, where the method learns from one

    def instance_balanced(self, epoch: int) -> np.ndarray:
        """Every sample once: rows, int64 [N]."""
        return samplers.instance_balanced(self.seed, epoch, self.sample_id)

    def class_balanced(self, epoch: int) -> np.ndarray:
        """N draws, each class that has samples as likely as any other (an expert's has not all): rows, int64 [N]."""
        return samplers.class_sampled(self.seed, epoch, self.label, (self.class_counts > 0).astype(float))

    def deferred_weights(self, beta: float, share: float) -> "DeferredWeights":
        """Class weights (`beta`) that count after `share` of the epochs."""
        return DeferredWeights(self.class_weights(beta), self.first_epoch(share))

    def first_epoch(self, share: float) -> int:
        """The epoch, from 0, that begins after `share` of all epochs."""
        return round(share * self.epochs)

    def class_weights(self, beta: float) -> torch.Tensor:
        """The effective-number weight of each class, of mean 1 over the classes: float32 [C] on the device."""
        weights = losses.effective_number_weights(torch.as_tensor(self.class_counts), beta)
        return (weights * len(weights) / weights.sum()).float().to(self.device)


@dataclass(frozen=True)
class DeferredWeights:
    """A weight for each class, from some epoch on (DRW; Cao et al., 2019)."""

    by_class: torch.Tensor  # float32 [C]
    first: int  # the epoch, from 0

    def of(self, label: torch.Tensor, epoch: int) -> torch.Tensor | None:
        """The weights of images of classes `label` [B]: float32 [B], or None before they count."""
        return self.by_class[label] if epoch >= self.first else None


def classified(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Whether each image's largest logit is its label's: bool [B]."""
    return logits.argmax(1) == batch.label
