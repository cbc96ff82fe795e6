"""Methods that learn from labels alone: cross-entropy and its re-weighted, re-margined kin. The model runs as it is."""

import torch

from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.models import classifier
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods.contract import Context, StepLoss, classified


class CrossEntropy:
    def __init__(self, settings: schema.CE, context: Context):
        self.network, self.label_smoothing = context.model, settings.label_smoothing
        self.rows = context.class_balanced if settings.sampler == "class_balanced" else context.instance_balanced

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        loss = losses.cross_entropy(logits, batch.label, self.label_smoothing)
        return StepLoss(loss=loss, correct=classified(logits, batch))


class ClassBalanced:
    def __init__(self, settings: schema.CB, context: Context):
        self.network, self.rows = context.model, context.instance_balanced
        self.weights = context.deferred_weights(settings.beta, settings.reweight_from)

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        weight = self.weights.of(batch.label, epoch)
        return StepLoss(loss=losses.cross_entropy(logits, batch.label), correct=classified(logits, batch), weight=weight)


class Focal:
    def __init__(self, settings: schema.Focal, context: Context):
        self.network, self.rows, self.gamma = context.model, context.instance_balanced, settings.gamma

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        return StepLoss(loss=losses.focal(logits, batch.label, self.gamma), correct=classified(logits, batch))


class ClassBalancedFocal:
    """The weights multiply the loss and its mean is the plain one; p is of the unweighted cross-entropy (Cui et al., 2019).

    In LDAM's public code p is of the weighted one.
    """

    def __init__(self, settings: schema.CBFocal, context: Context):
        self.network, self.rows, self.gamma = context.model, context.instance_balanced, settings.gamma
        self.weights = context.deferred_weights(settings.beta, settings.reweight_from)

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        loss, weight = losses.focal(logits, batch.label, self.gamma), self.weights.of(batch.label, epoch)
        return StepLoss(loss=loss if weight is None else weight * loss, correct=classified(logits, batch))


class LogitAdjustment:
    def __init__(self, settings: schema.LogitAdjustment, context: Context):
        self.network, self.rows, self.tau = context.model, context.instance_balanced, settings.tau
        counts = torch.as_tensor(context.class_counts)
        self.log_prior = (counts / counts.sum()).log().float().to(context.device)

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        loss = losses.logit_adjusted(logits, batch.label, self.log_prior, self.tau)
        return StepLoss(loss=loss, correct=classified(logits, batch))


class MarginWithDeferredWeights:
    """LDAM-DRW."""

    def __init__(self, settings: schema.LDAM, context: Context):
        self.network, self.rows = context.model, context.instance_balanced
        margins = losses.ldam_margins(torch.as_tensor(context.class_counts), settings.max_margin)
        self.margins = classifier(context.model).scale * margins.float().to(context.device)
        self.weights = context.deferred_weights(settings.beta, settings.reweight_from)

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        weight = self.weights.of(batch.label, epoch)
        loss = losses.ldam(logits, batch.label, self.margins)
        return StepLoss(loss=loss, correct=classified(logits, batch), weight=weight)
