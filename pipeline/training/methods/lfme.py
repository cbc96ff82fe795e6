"""LFME: self-paced distillation from one expert for each shot group, on class-balanced samples (Xiang et al., 2020)."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from offline_bkd.cache.shots import shot_groups
from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods.contract import Context, StepLoss, classified


class MultipleExperts:
    def __init__(self, settings: schema.LFME, context: Context):
        self.rows, self.targets, self.epochs, self.theta = (
            context.class_balanced,
            context.targets,
            context.epochs,
            settings.theta,
        )
        shots = [members for members in shot_groups(context.class_counts).values() if members.any()]
        self.groups = [torch.from_numpy(np.flatnonzero(members)).to(context.device) for members in shots]
        self.group_of = torch.from_numpy(np.argmax(shots, axis=0)).to(context.device)  # int64 [C]
        self.network = Graded(context.model, context.epochs, len(self.groups)).to(context.device)

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        temperature, target = self.targets.temperature, self.targets.probability(batch.rows, batch.views)
        untempered, kd = torch.zeros_like(target), 0  # each expert's probabilities at temperature 1
        for group, weight in zip(self.groups, losses.expert_weight(self.network.right[epoch], self.theta)):
            tempered = target[:, group] / target[:, group].sum(1, keepdim=True)
            untempered[:, group] = losses.retempered(tempered, temperature)
            # the authors' code has no T^2
            kd = kd + weight * losses.distillation(logits[:, group], tempered, temperature) / temperature**2
        own_group, correct = self.group_of[batch.label], classified(logits, batch)
        expert = untempered.masked_fill(self.group_of != own_group[:, None], 0)  # the answer of the image's own expert
        right = torch.stack([expert.argmax(1) == batch.label, correct]).float()
        self.network.right[epoch + 1] += right @ functional.one_hot(own_group, len(self.groups)).float()
        confidence = expert.gather(1, batch.label[:, None])[:, 0]
        # the paper weighs the loss, its public code the logits
        trust = confidence + (1 - confidence) * min(1, 2 * epoch / self.epochs)
        ce = trust * losses.cross_entropy(logits, batch.label)
        return StepLoss(loss=ce + kd, correct=correct, parts={"ce": ce, "kd": kd})


class Graded(nn.Module):
    """The model, and of every epoch how many images of each of K shot groups its expert and the model answered rightly.

    Counts are kept as a buffer, so that an interrupted run has them too; the first row is that of no epoch.
    """

    def __init__(self, model: nn.Module, epochs: int, groups: int):
        super().__init__()
        self.model = model
        self.register_buffer("right", torch.zeros(epochs + 1, 2, groups))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)
