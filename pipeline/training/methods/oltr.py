"""OLTR: another run's backbone, with attention and a memory of class centroids (Liu et al., 2019)."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.models import classifier, memory, new_parts
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods.contract import Context, StepLoss, classified
from offline_bkd.pipeline.training.methods.distillation import WithFeatures

MEMORY_WEIGHT = 0.01


class OpenLongTail:
    def __init__(self, settings: schema.OLTR, context: Context):
        self.memory, first = memory(context.model), classifier(context.backbone)
        self.network = WithFeatures(self.freeze(settings, context.model), self.memory)
        self.rows = context.class_balanced
        with torch.no_grad():
            self.memory.centroids.copy_(class_means(self.network, context))
        if isinstance(first, nn.Linear) and first.weight.shape == self.memory.hallucinator.weight.shape:
            self.memory.hallucinator.load_state_dict(first.state_dict())

    @staticmethod
    def freeze(settings: schema.OLTR, model: nn.Module) -> nn.Module:
        """With `freeze_backbone`, the attention, the memory and the classifier alone learn."""
        new = tuple(f"{name}." for name in new_parts(model))
        for name, parameter in model.named_parameters() if settings.freeze_backbone else ():
            parameter.requires_grad_(name.startswith(new))
        return model

    def loss(self, output: tuple[torch.Tensor, torch.Tensor], batch: Batch, epoch: int) -> StepLoss:
        logits, features = output
        ce = losses.cross_entropy(logits, batch.label)
        distance = losses.memory(features, batch.label, self.memory.centroids)
        loss = ce + MEMORY_WEIGHT * distance + losses.centroid_pull(features, batch.label, self.memory.centroids)
        return StepLoss(loss=loss, correct=classified(logits, batch), parts={"ce": ce, "distance": distance})


@torch.no_grad()
def class_means(network: WithFeatures, context: Context) -> torch.Tensor:
    """The mean over each class's training images, uncropped, of the features that the memory is given: float32 [C, D]."""
    network.eval()
    total = 0
    for batch in context.images.batches(np.arange(len(context.label)), None, 500):
        _, features = network(batch.images)
        total = total + functional.one_hot(batch.label, len(context.class_counts)).float().T @ features
    return total / torch.from_numpy(context.class_counts).to(total)[:, None]
