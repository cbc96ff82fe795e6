"""Losses and class weights, as pure functions.

Shapes: logits z [B, C], labels y int64 [B], probability p [B, C] (a teacher's, tempered by T), weights w [C].
Losses are per sample, float32 [B]; the engine takes the mean.
"""

import torch
from torch.nn import functional


def cross_entropy(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """-log softmax(z)_y."""
    return functional.cross_entropy(logits, label, reduction="none")


def effective_number_weights(class_counts: torch.Tensor, beta: float) -> torch.Tensor:
    """w_c = (1 - beta) / (1 - beta^n_c), float64 [C] (Cui et al., 2019, eq. 2; BKD, eq. 2). Their scale is arbitrary."""
    counts = class_counts.double()
    return (1 - beta) / (1 - beta**counts)


def balanced_probability(probability: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """q = w p / sum_c w_c p_c, each row normalised (BKD, section 4.2, eq. 8).

    For p = softmax(z / T) this is softmax((z + T log w) / T): a teacher whose logits are shifted by T log w.
    """
    weighted = probability * weights
    return weighted / weighted.sum(1, keepdim=True)


def distillation(logits: torch.Tensor, probability: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(p || softmax(z / T)), summed over classes (Hinton et al., 2015; BKD, eq. 6)."""
    log_student = functional.log_softmax(logits / temperature, dim=1)
    return temperature**2 * (torch.xlogy(probability, probability) - probability * log_student).sum(1)
