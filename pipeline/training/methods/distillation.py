"""Methods that learn from what a cache holds of whole teachers: KD and BKD from probabilities, CBD from features."""

from collections.abc import Iterable

import torch
from torch import nn

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.models import classifier
from offline_bkd.pipeline.training import losses
from offline_bkd.pipeline.training.methods.contract import Context, StepLoss, classified


class Distillation:
    """KD. The cross-entropy is a plain one, as in the BKD paper's eq. 5; its public script weighs it by class."""

    def __init__(self, settings: schema.KD | schema.BKD, context: Context):
        self.network, self.rows, self.targets = context.model, context.instance_balanced, context.targets
        self.alpha, self.temperature = settings.alpha, settings.temperature or context.targets.temperature

    def target(self, batch: Batch, epoch: int) -> torch.Tensor:
        """What the student learns from: probabilities [B, C] at `temperature`."""
        return self.targets.probability(batch.rows, batch.views, self.temperature)

    def loss(self, logits: torch.Tensor, batch: Batch, epoch: int) -> StepLoss:
        ce = losses.cross_entropy(logits, batch.label)
        kd = losses.distillation(logits, self.target(batch, epoch), self.temperature)
        return StepLoss(loss=ce + self.alpha * kd, correct=classified(logits, batch), parts={"ce": ce, "kd": kd})


class BalancedDistillation(Distillation):
    """BKD: the teacher's probabilities are weighted by class before the student learns from them."""

    def __init__(self, settings: schema.BKD, context: Context):
        super().__init__(settings, context)
        counts = torch.as_tensor(context.class_counts)
        self.weights = losses.effective_number_weights(counts, settings.beta).float().to(context.device)
        self.first = context.first_epoch(settings.reweight_from)

    def target(self, batch: Batch, epoch: int) -> torch.Tensor:
        plain = super().target(batch, epoch)
        return losses.balanced_probability(plain, self.weights) if epoch >= self.first else plain


class ClassBalancedDistillation:
    """CBD; of several teachers, whose features come side by side, CBD-ENS."""

    def __init__(self, settings: schema.CBD, context: Context):
        refuse_width(context.model, context.targets.widths)
        self.network = WithFeatures(context.model, classifier(context.model))
        self.rows, self.targets, self.alpha, self.beta = context.class_balanced, context.targets, settings.alpha, settings.beta

    def loss(self, output: tuple[torch.Tensor, torch.Tensor], batch: Batch, epoch: int) -> StepLoss:
        logits, features = output
        ce = losses.cross_entropy(logits, batch.label)
        distance = losses.feature_distance(features, self.targets.features(batch.rows, batch.views))
        loss = (1 - self.alpha) * ce + self.alpha * self.beta * distance
        return StepLoss(loss=loss, correct=classified(logits, batch), parts={"ce": ce, "distance": distance})


class WithFeatures(nn.Module):
    """Images to the model's logits [B, C] and its features [B, D], the input of `layer`."""

    def __init__(self, model: nn.Module, layer: nn.Module):
        super().__init__()
        self.model, self.seen = model, None
        layer.register_forward_pre_hook(self._keep)  # a method, so that a copy of this keeps to itself

    def _keep(self, _, inputs: tuple) -> None:
        self.seen = inputs[0]  # of the latest batch alone: an evaluation, or an average's, comes by here too

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.model(images)
        return logits, self.seen.float()


def refuse_width(model: nn.Module, widths: Iterable[int]) -> None:
    """Raises UserError unless the features of `model` are as wide as `widths` together, as CBD needs them."""
    teachers, student = sum(widths), classifier(model).in_features
    if student != teachers:
        raise UserError(
            f"the student's features are {student} wide, those of the cache's teachers together {teachers}; "
            f"set student.model.projection={teachers}"
        )
