"""What each method minimises: a function of logits [B, C], a batch and the epoch, to per-sample terms [B].

The term "loss" is minimised; the others are reported. Formulas are in losses.py, settings in config.py.
"""

import numpy as np
import torch

from pipeline import config, losses


def method_loss(method, gather, temperature: float, class_counts: np.ndarray, device: torch.device):
    """The loss of `method`, one of the methods of config.py.

    `gather(rows, views)` gives the teacher's probabilities [B, C], tempered by `temperature`; None for a method that
    needs no cache. `class_counts` [C] are the training set's.
    """
    return LOSSES[method.name](method, gather, temperature, torch.as_tensor(class_counts), device)


def needs_cache(method) -> bool:
    """Whether `method` learns from a teacher's answers."""
    return isinstance(method, (config.KD, config.BKD))


def _ce(method, gather, temperature, class_counts, device):
    return lambda logits, batch, epoch: {"loss": losses.cross_entropy(logits, batch.label)}


def _distilled(method, gather, temperature, class_counts, device):
    weights = None
    if method.name == "bkd":
        weights = losses.effective_number_weights(class_counts, method.beta).float().to(device)

    def loss(logits, batch, epoch):
        target = gather(batch.rows, batch.views)
        if weights is not None and epoch >= method.reweight_from:
            target = losses.balanced_probability(target, weights)
        ce = losses.cross_entropy(logits, batch.label)
        kd = losses.distillation(logits, target, temperature)
        return {"loss": ce + method.alpha * kd, "ce": ce, "kd": kd}

    return loss


def _class_balanced(method, gather, temperature, class_counts, device):
    weigh = _label_weights(method, class_counts, device)
    return lambda logits, batch, epoch: {"loss": weigh(batch, epoch) * losses.cross_entropy(logits, batch.label)}


def _focal(method, gather, temperature, class_counts, device):
    return lambda logits, batch, epoch: {"loss": losses.focal(logits, batch.label, method.gamma)}


def _class_balanced_focal(method, gather, temperature, class_counts, device):
    weigh = _label_weights(method, class_counts, device)
    return lambda logits, batch, epoch: {"loss": weigh(batch, epoch) * losses.focal(logits, batch.label, method.gamma)}


def _logit_adjusted(method, gather, temperature, class_counts, device):
    log_prior = (class_counts / class_counts.sum()).log().float().to(device)
    return lambda logits, batch, epoch: {"loss": losses.logit_adjusted(logits, batch.label, log_prior, method.tau)}


def _ldam(method, gather, temperature, class_counts, device):
    margin = losses.ldam_margins(class_counts, method.max_margin).float().to(device)
    weigh = _label_weights(method, class_counts, device)

    def loss(logits, batch, epoch):
        return {"loss": weigh(batch, epoch) * losses.ldam(logits, batch.label, margin, method.scale)}

    return loss


def _label_weights(method, class_counts, device):
    """The effective-number weight of each sample's class, of mean 1 over the classes, from epoch `reweight_from`."""
    weights = losses.effective_number_weights(class_counts, method.beta)
    weights = (weights * len(weights) / weights.sum()).float().to(device)

    def weigh(batch, epoch):
        return weights[batch.label] if epoch >= method.reweight_from else torch.ones((), device=device)

    return weigh


LOSSES = {
    "ce": _ce,
    "kd": _distilled,
    "bkd": _distilled,
    "cb": _class_balanced,
    "focal": _focal,
    "cb_focal": _class_balanced_focal,
    "logit_adjustment": _logit_adjusted,
    "ldam": _ldam,
}
