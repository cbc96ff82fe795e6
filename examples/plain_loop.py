"""Balanced Knowledge Distillation from a cache in a training loop of one's own.

    python examples/plain_loop.py runs/digits/cache.zarr

The cache is that of `make demo`. The images here are the same handwritten digits; for others, any data set that gives
(whole image, label) pairs will do.
"""

import sys
from pathlib import Path

import torch
from torch import nn

from offline_bkd import CachedTargets, bkd_loss, open_cache
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.data import datasets

DIGITS = Path(__file__).parent.parent / "configs" / "digits.yaml"


def main(store: str, epochs: int = 3) -> list[float]:
    train, *_ = datasets.load(load_config(DIGITS).data)
    pairs = [(train.decode(row), int(train.label[row])) for row in range(len(train))]
    cache = open_cache(store)
    data = CachedTargets(cache, pairs, seed=0)
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, num_workers=2, persistent_workers=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 128), nn.ReLU(), nn.Linear(128, len(cache.classes))).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    means = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        losses = []
        for batch in loader:
            image, target, label = (part.to(device) for part in (batch.image, batch.target, batch.label))
            loss = bkd_loss(network(image / 255), target, label, cache.class_counts, temperature=cache.temperature)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        means.append(sum(losses) / len(losses))
        print(f"epoch {epoch + 1}: loss {means[-1]:.4f}")
    return means


if __name__ == "__main__":
    main(sys.argv[1])
