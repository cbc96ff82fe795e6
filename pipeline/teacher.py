"""Recipe: train a teacher on the long-tailed set with cross-entropy."""

import torch

from pipeline import runs
from pipeline.config import CE, Experiment
from pipeline.data import datasets
from pipeline.recipe import train_network


def train_teacher(config: Experiment, out: str, device: torch.device, resume: bool = False) -> None:
    """Trains the teacher of `config` into the folder `out`."""
    runs.refuse_taken(out, resume)
    train_network(config, "teacher", CE(name="ce"), datasets.load(config.data), None, out, device, resume)
