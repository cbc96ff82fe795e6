"""cRT: another run's backbone stays as it is, and a new classifier learns on class-balanced samples (Kang et al., 2020)."""

import torch
from torch import nn

from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.models import classifier
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods.contract import Context, StepLoss, classified


class ClassifierRetraining:
    def __init__(self, settings: schema.CRT, context: Context):
        self.network, self.rows = self.freeze(settings, context.model), context.class_balanced

    @staticmethod
    def freeze(settings: schema.CRT, model: nn.Module) -> nn.Module:
        return FrozenBackbone(model, settings.batch_statistics)

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        return StepLoss(loss=losses.cross_entropy(logits, batch.label), correct=classified(logits, batch))


class FrozenBackbone(nn.Module):
    """The model, of which only the classifier learns: all other parameters are frozen.

    With `batch_statistics` the backbone normalises by the batch in training, and its running statistics become those of
    class-balanced data, as in the public code; without, all of it is in evaluation mode.
    """

    def __init__(self, model: nn.Module, batch_statistics: bool):
        super().__init__()
        self.model, self.batch_statistics = model.requires_grad_(False), batch_statistics
        classifier(model).requires_grad_(True)

    def train(self, mode: bool = True):
        return super().train(mode and self.batch_statistics)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)
