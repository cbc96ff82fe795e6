"""Losses and class weights, as pure functions.

Shapes: logits z [B, C], labels y int64 [B], probability p [B, C] (a teacher's, tempered by T), weights w [C].
Losses are per sample, float32 [B]; the engine takes the mean, by the method's sample weights where it gives any.
"""

import torch
from torch.nn import functional


def cross_entropy(logits: torch.Tensor, label: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """-log softmax(z)_y; with smoothing e, (1 - e) of that and e of the mean of -log softmax(z)_c over all classes c."""
    return functional.cross_entropy(logits, label, reduction="none", label_smoothing=label_smoothing)


def focal(logits: torch.Tensor, label: torch.Tensor, gamma: float) -> torch.Tensor:
    """-(1 - p_y)^gamma log p_y (Lin et al., 2017, eq. 4)."""
    ce = cross_entropy(logits, label)
    # a power below one has no slope at zero, where the label is certain
    return (-torch.expm1(-ce)).clamp_min(1e-12).pow(gamma) * ce


def logit_adjusted(logits: torch.Tensor, label: torch.Tensor, log_prior: torch.Tensor, tau: float) -> torch.Tensor:
    """Cross-entropy of z + tau log pi, pi [C] the classes' shares of the training set (Menon et al., 2021, eq. 10)."""
    return cross_entropy(logits + tau * log_prior, label)


def ldam(logits: torch.Tensor, label: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of z - margin_y e_y (Cao et al., 2019, eq. 12), for a cosine classifier.

    Its logits are s times a cosine, and `margin` [C] is s times that of the paper.
    """
    return cross_entropy(logits - functional.one_hot(label, logits.shape[1]) * margin[label, None], label)


def ldam_margins(class_counts: torch.Tensor, largest: float) -> torch.Tensor:
    """margin_c in proportion to n_c^(-1/4), the largest being `largest`: float64 [C] (Cao et al., 2019, eq. 11)."""
    margins = class_counts.double().pow(-0.25)
    return margins * (largest / margins.max())


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


def retempered(probability: torch.Tensor, ratio: float) -> torch.Tensor:
    """softmax(z / T') of p = softmax(z / T), with `ratio` T / T'."""
    return torch.softmax(ratio * probability.log(), dim=1)  # zero stays zero


def distillation(logits: torch.Tensor, probability: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(p || softmax(z / T)), summed over classes (Hinton et al., 2015; BKD, eq. 6)."""
    log_student = functional.log_softmax(logits / temperature, dim=1)
    # p log p is 0 at 0, as in torch.xlogy, which is several times slower on a CPU
    log_probability = probability.clamp_min(torch.finfo(probability.dtype).tiny).log()
    return -(temperature**2) * (probability * (log_student - log_probability)).sum(1)


def expert_weight(right: torch.Tensor, theta: float) -> torch.Tensor:
    """w_l of each shot group's expert, [K], falling from 1 to 0 while the student catches up (Xiang et al., 2020).

    `right` [2, K]: how many of the same images expert and student answered rightly. With r the ratio of the accuracies,
    student's over expert's, w is 1 while r < theta and then (1 - r) / (1 - theta), from r = 1 on zero.
    """
    expert, student = right
    return ((1 - student / expert.clamp_min(1)) / (1 - theta)).clamp(0, 1)


def memory(features: torch.Tensor, label: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """|v - M_y|^2 / 2 + 0.01 max(0, 10 - d), d the batch's mean of sum_{c != y} |v - M_c|^2 / C (Liu et al., 2019, 3.3).

    Of features v [B, D] and centroids M [C, D]. The first term moves the features alone, to their centroids; the margin
    moves features and centroids apart. `centroid_pull` draws the centroids to their features.
    """
    own = (features - centroids[label].detach()).square().sum(1)
    distances = torch.cdist(features, centroids).square()
    others = distances.sum(1) - distances.gather(1, label[:, None])[:, 0]
    return own / 2 + 0.01 * (10 - others.mean() / len(centroids)).clamp_min(0)


def centroid_pull(features: torch.Tensor, label: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Zeros [B] whose gradient draws each centroid M_c [D] to the batch's n_c features v of its class.

    The mean's gradient at M_c is sum (M_c - v) / ((1 + n_c) B), as in OLTR's public code, whose centre loss lets no weight
    of the loss reach the centroids: scaled by 0.01 with the rest they would learn 20 to 50 times as slowly.
    """
    count = functional.one_hot(label, len(centroids)).sum(0)
    pull = (features.detach() - centroids[label]).square().sum(1) / (2 * (1 + count[label]))
    return pull - pull.detach()


def feature_distance(features: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """1 - cos(f, t) of features [B, D] and a teacher's of length one (CBD)."""
    return 1 - (functional.normalize(features) * teacher).sum(1)
