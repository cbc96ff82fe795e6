"""What OLTR (Liu et al., 2019) adds to a network: attention before the features are pooled, a memory of classes after.

Shapes: B images, D channels and so features, h x w positions of the last feature map, C classes.
"""

import torch
from torch import nn

from offline_bkd.pipeline.models.classifiers import SquashedCosineClassifier

REACH = 10  # over the distance to the nearest centroid: how surely a feature is of a known class
NEAREST = 1e-6  # below which that distance, a divisor, does not fall


class ModulatedAttention(nn.Module):
    """Feature maps x [B, D, h, w] to x + s * m of the same shape (section 3.2).

    m comes of a non-local block (Wang et al., 2018, embedded Gaussian) and starts as zero; s [B, 1, h, w], positive and
    of sum one, says where it counts. As s is a linear map of all of x, h and w are fixed.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 2, 1) for _ in range(3))
        self.mask = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.spatial = nn.Linear(channels * height * width, height * width)
        for layer in (self.query, self.key, self.value):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.mask.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))  # [B, D / 2, h w]
        share = (query.transpose(1, 2) @ key).softmax(2)  # of every position in each: [B, h w, h w]
        mask = self.mask((value @ share.transpose(1, 2)).unflatten(2, x.shape[2:]))
        return x + self.spatial(x.flatten(1)).softmax(1).view(len(x), 1, *x.shape[2:]) * mask


class Memory(nn.Module):
    """Features v [B, D] to logits [B, C], with the help of a centroid M_c of each class (section 3.1).

    logits = classifier(REACH / min_c |v - M_c| * (v + tanh(selector(v)) * softmax(hallucinator(v)) M)). The centroids,
    [C, D], learn not from the logits but from `losses.memory`, by its margin, and `losses.centroid_pull`; a method gives them
    their first values.
    """

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.centroids = nn.Parameter(torch.zeros(classes, inputs))
        self.hallucinator = nn.Linear(inputs, classes)
        self.selector = nn.Linear(inputs, inputs)
        self.classifier = SquashedCosineClassifier(inputs, classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        centroids = self.centroids.detach()
        features = features.to(centroids.dtype)  # bfloat16 is too coarse for distances
        recalled = self.hallucinator(features).softmax(1) @ centroids
        reach = REACH / torch.cdist(features, centroids).amin(1, keepdim=True).clamp_min(NEAREST)
        return self.classifier(reach * (features + self.selector(features).tanh() * recalled))
