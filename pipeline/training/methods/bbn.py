"""BBN: two branches, of uniform and of reversed samples, share their weight over the epochs (Zhou et al., 2020)."""

import numpy as np
import torch
from torch import nn

from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.training import losses, samplers
from offline_bkd.pipeline.training.methods.contract import Context, StepLoss


class BilateralBranches:
    """Every even place of a batch is of the uniform branch, every odd one of the reversed."""

    def __init__(self, settings: schema.BBN, context: Context):
        self.network, self.context, self.final_share = Bilateral(context.model), context, settings.final_share
        self.reverse_weight = samplers.reverse_weight(context.class_counts)

    def rows(self, epoch: int) -> np.ndarray:
        reverse = samplers.class_sampled(self.context.seed, epoch, self.context.label, self.reverse_weight)
        return np.stack([self.context.instance_balanced(epoch), reverse], axis=1).reshape(-1)

    def loss(self, output: tuple[torch.Tensor, torch.Tensor], batch: Batch, epoch: int) -> StepLoss:
        # the share of the uniform branch (BBN, section 4.3)
        uniform = 1 - (1 - self.final_share) * (epoch / self.context.epochs) ** 2
        features = torch.cat([2 * uniform * output[0], 2 * (1 - uniform) * output[1]], dim=1)
        logits = self.context.model.network.fc(features)  # with a projection, if there is one
        shares = [(uniform, batch.label[0::2]), (1 - uniform, batch.label[1::2])]
        loss = sum(share * losses.cross_entropy(logits, label) for share, label in shares)
        correct = sum(share * (logits.argmax(1) == label) for share, label in shares)
        # a pair's answer counts for both of its images
        return StepLoss(loss=loss.repeat_interleave(2), correct=correct.repeat_interleave(2))


class Bilateral(nn.Module):
    """Images [B, ...] to pooled features [B / 2, D] of the even ones by one branch and of the odd ones by the other."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        network = self.model.network
        shared = network.shared(self.model.normalise(images))
        even, odd = (branch(shared[place::2]) for place, branch in enumerate(network.branches))
        return even.mean((2, 3)).float(), odd.mean((2, 3)).float()
