"""Methods: what a step runs, which rows an epoch visits and what is minimised, for each method of config.py.

Formulas are in losses.py and samplers.py, settings in config.py. Shapes: N samples, B a batch, C classes, D features.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from offline_bkd.pipeline import UserError, metrics
from offline_bkd.pipeline.models import classifier, memory
from offline_bkd.pipeline.training import losses, samplers
from offline_bkd.pipeline.training.targets import Targets


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a method may build on."""

    model: nn.Module
    sample_id: np.ndarray  # int64 [N]
    label: np.ndarray  # int64 [N]
    class_counts: np.ndarray  # int64 [C]
    targets: Targets | None  # of the cache, where the method learns from one
    epochs: int
    seed: int
    device: torch.device
    images: object = None  # a source of pipeline.data.images, of the training part
    backbone: nn.Module | None = None  # the other run's network, where the method learns from one


class Recipe(NamedTuple):
    network: nn.Module  # images to what the loss takes; has the model's parameters, perhaps some of them frozen
    rows: Callable[[int], np.ndarray]  # epoch -> the rows that it visits, in order
    loss: Callable  # network's output, batch, epoch -> {"loss": [B], "correct": [B], parts to report: [B]}


def build_method(method, setting: Setting) -> Recipe:
    """The recipe of `method`, a section of config.py. Raises UserError where the setting does not fit it."""
    return METHODS[method.name](method, setting)


def _on_logits(terms: Callable) -> Callable:
    """A method that runs the model as it is; `terms(method, setting)` gives logits, batch, epoch -> its loss and parts."""

    def build(method, setting: Setting) -> Recipe:
        found = terms(method, setting)

        def loss(logits, batch, epoch):
            return {**found(logits, batch, epoch), "correct": logits.argmax(1) == batch.label}

        balanced = getattr(method, "sampler", "instance_balanced") == "class_balanced"
        return Recipe(setting.model, _class_balanced(setting) if balanced else _instance_balanced(setting), loss)

    return build


def _instance_balanced(setting: Setting) -> Callable:
    return partial(samplers.instance_balanced, setting.seed, sample_id=setting.sample_id)


def _class_balanced(setting: Setting) -> Callable:
    weight = np.ones(len(setting.class_counts))
    return partial(samplers.class_sampled, setting.seed, label=setting.label, weight=weight)


@_on_logits
def _ce(method, setting):
    return lambda logits, batch, epoch: {"loss": losses.cross_entropy(logits, batch.label)}


@_on_logits
def _distilled(method, setting):
    gather, weights = setting.targets.gather, None
    temperature = method.temperature or setting.targets.temperature
    if method.name == "bkd":
        counts = torch.as_tensor(setting.class_counts)
        weights = losses.effective_number_weights(counts, method.beta).float().to(setting.device)
        first = round(method.reweight_from * setting.epochs)

    def terms(logits, batch, epoch):
        target = gather(batch.rows, batch.views, temperature)
        if weights is not None and epoch >= first:
            target = losses.balanced_probability(target, weights)
        ce = losses.cross_entropy(logits, batch.label)
        kd = losses.distillation(logits, target, temperature)
        return {"loss": ce + method.alpha * kd, "ce": ce, "kd": kd}

    return terms


@_on_logits
def _cb(method, setting):
    weigh = _label_weights(method, setting)
    return lambda logits, batch, epoch: {"loss": weigh(batch, epoch) * losses.cross_entropy(logits, batch.label)}


@_on_logits
def _focal(method, setting):
    return lambda logits, batch, epoch: {"loss": losses.focal(logits, batch.label, method.gamma)}


@_on_logits
def _cb_focal(method, setting):
    weigh = _label_weights(method, setting)
    return lambda logits, batch, epoch: {"loss": weigh(batch, epoch) * losses.focal(logits, batch.label, method.gamma)}


@_on_logits
def _logit_adjustment(method, setting):
    counts = torch.as_tensor(setting.class_counts)
    log_prior = (counts / counts.sum()).log().float().to(setting.device)
    return lambda logits, batch, epoch: {"loss": losses.logit_adjusted(logits, batch.label, log_prior, method.tau)}


@_on_logits
def _ldam(method, setting):
    margins = losses.ldam_margins(torch.as_tensor(setting.class_counts), method.max_margin)
    margin = classifier(setting.model).scale * margins.float().to(setting.device)
    weigh = _label_weights(method, setting)
    return lambda logits, batch, epoch: {"loss": weigh(batch, epoch) * losses.ldam(logits, batch.label, margin)}


def _label_weights(method, setting):
    """The effective-number weight of each sample's class, of mean 1 over the classes, after `reweight_from` of the epochs.

    The mean over a batch stays a plain one, as the formulas have it; public code of CB and LDAM divides by the batch's sum.
    """
    weights = losses.effective_number_weights(torch.as_tensor(setting.class_counts), method.beta)
    weights = (weights * len(weights) / weights.sum()).float().to(setting.device)
    first = round(method.reweight_from * setting.epochs)

    def weigh(batch, epoch):
        return weights[batch.label] if epoch >= first else torch.ones((), device=setting.device)

    return weigh


class FrozenBackbone(nn.Module):
    """The model, of which only the classifier learns: all else is frozen and in evaluation mode."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model.requires_grad_(False)
        classifier(model).requires_grad_(True)

    def train(self, mode: bool = True):
        super().train(False)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def _crt(method, setting: Setting) -> Recipe:
    plain = _ce(method, setting)
    return Recipe(FrozenBackbone(setting.model), _class_balanced(setting), plain.loss)


class WithFeatures(nn.Module):
    """Images to the model's logits [B, C] and its features [B, D], the input of `layer`."""

    def __init__(self, model: nn.Module, layer: nn.Module):
        super().__init__()
        self.model, self.seen = model, []
        layer.register_forward_pre_hook(self._keep)  # a method, so that a copy of this keeps to itself

    def _keep(self, _, inputs: tuple) -> None:
        self.seen.append(inputs[0])

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.clear()
        logits = self.model(images)
        return logits, self.seen.pop().float()


def refuse_width(model: nn.Module, widths: Iterable[int]) -> None:
    """Raises UserError unless the features of `model` are as wide as `widths` together, as CBD needs them."""
    theirs, own = sum(widths), classifier(model).in_features
    if own != theirs:
        raise UserError(
            f"the student's features are {own} wide, those of the cache's teachers together {theirs}; "
            f"set student.model.projection={theirs}"
        )


def _cbd(method, setting: Setting) -> Recipe:
    refuse_width(setting.model, setting.targets.widths)

    def loss(output, batch, epoch):
        logits, features = output
        ce = losses.cross_entropy(logits, batch.label)
        distance = losses.feature_distance(features, setting.targets.gather(batch.rows, batch.views))
        total = (1 - method.alpha) * ce + method.alpha * method.beta * distance
        return {"loss": total, "correct": logits.argmax(1) == batch.label, "ce": ce, "distance": distance}

    return Recipe(WithFeatures(setting.model, classifier(setting.model)), _class_balanced(setting), loss)


def _oltr(method, setting: Setting) -> Recipe:
    recollection, first = memory(setting.model), classifier(setting.backbone)
    with torch.no_grad():
        recollection.centroids.copy_(_class_means(setting))
    if isinstance(first, nn.Linear):
        recollection.hallucinator.load_state_dict(first.state_dict())

    def loss(output, batch, epoch):
        logits, features = output
        ce = losses.cross_entropy(logits, batch.label)
        distance = losses.memory(features, batch.label, recollection.centroids)
        total = ce + 0.01 * distance
        return {"loss": total, "correct": logits.argmax(1) == batch.label, "ce": ce, "distance": distance}

    return Recipe(WithFeatures(setting.model, recollection), _class_balanced(setting), loss)


@torch.no_grad()
def _class_means(setting: Setting) -> torch.Tensor:
    """The mean over each class's training images, uncropped, of the backbone's features: float32 [C, D]."""
    network = WithFeatures(setting.backbone, classifier(setting.backbone)).eval()
    total = 0
    for batch in setting.images.batches(np.arange(len(setting.label)), None, 500):
        _, features = network(batch.images)
        total = total + functional.one_hot(batch.label, len(setting.class_counts)).float().T @ features
    return total / torch.from_numpy(setting.class_counts).to(total)[:, None]


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


def _lfme(method, setting: Setting) -> Recipe:
    temperature = setting.targets.temperature
    shots = [members for members in metrics.shot_groups(setting.class_counts).values() if members.any()]
    groups = [torch.from_numpy(np.flatnonzero(members)).to(setting.device) for members in shots]
    group_of = torch.from_numpy(np.argmax(shots, axis=0)).to(setting.device)  # int64 [C]
    network = Graded(setting.model, setting.epochs, len(groups)).to(setting.device)

    def loss(logits, batch, epoch):
        target = setting.targets.gather(batch.rows, batch.views)
        plain, kd = torch.zeros_like(target), 0  # plain: each expert's probabilities without temperature
        for group, weight in zip(groups, losses.expert_weight(network.right[epoch], method.theta)):
            tempered = target[:, group] / target[:, group].sum(1, keepdim=True)
            plain[:, group] = losses.retempered(tempered, temperature)
            # the authors' code has no T^2
            kd = kd + weight * losses.distillation(logits[:, group], tempered, temperature) / temperature**2
        own = group_of[batch.label]
        correct = logits.argmax(1) == batch.label
        taught = plain.masked_fill(group_of != own[:, None], 0)  # by the expert of the image's class
        right = torch.stack([taught.argmax(1) == batch.label, correct]).float()
        network.right[epoch + 1] += right @ functional.one_hot(own, len(groups)).float()
        confidence = taught.gather(1, batch.label[:, None])[:, 0]
        # the paper weighs the loss, its public code the logits
        ce = (confidence + (1 - confidence) * epoch / setting.epochs) * losses.cross_entropy(logits, batch.label)
        return {"loss": ce + kd, "correct": correct, "ce": ce, "kd": kd}

    return Recipe(network, _class_balanced(setting), loss)


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


def _bbn(method, setting: Setting) -> Recipe:
    uniform = _instance_balanced(setting)
    weight = samplers.reverse_weight(setting.class_counts)

    def rows(epoch: int) -> np.ndarray:
        reverse = samplers.class_sampled(setting.seed, epoch, setting.label, weight)
        return np.stack([uniform(epoch), reverse], axis=1).reshape(-1)

    def loss(output, batch, epoch):
        common = 1 - (epoch / setting.epochs) ** 2  # the share of the uniform branch (BBN, section 4.3)
        features = torch.cat([2 * common * output[0], 2 * (1 - common) * output[1]], dim=1)
        logits = setting.model.network.fc(features)  # with a projection, if there is one
        shares = [(common, batch.label[0::2]), (1 - common, batch.label[1::2])]
        total = sum(share * losses.cross_entropy(logits, label) for share, label in shares)
        correct = sum(share * (logits.argmax(1) == label) for share, label in shares)
        # a pair's answer counts for both of its images
        return {"loss": total.repeat_interleave(2), "correct": correct.repeat_interleave(2)}

    return Recipe(Bilateral(setting.model), rows, loss)


METHODS = {
    "ce": _ce,
    "kd": _distilled,
    "bkd": _distilled,
    "cb": _cb,
    "focal": _focal,
    "cb_focal": _cb_focal,
    "logit_adjustment": _logit_adjustment,
    "ldam": _ldam,
    "crt": _crt,
    "cbd": _cbd,
    "lfme": _lfme,
    "oltr": _oltr,
    "bbn": _bbn,
}
