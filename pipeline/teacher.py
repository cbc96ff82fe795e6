"""Recipe: train a teacher on the long-tailed set with cross-entropy, or on the classes of one shot group: an expert."""

import torch

from pipeline import runs
from pipeline.config import CE, Experiment
from pipeline.data import datasets
from pipeline.recipe import train_network


def train_teacher(config: Experiment, out: str, device: torch.device, resume: bool = False) -> None:
    """Trains the teacher of `config` into the folder `out`.

    An expert (LFME) sees, and is judged on, the images of its own classes alone, among which it answers.
    """
    runs.refuse_taken(out, resume)
    sets = datasets.load(config.data, config.teacher.expert)
    train_network(config, "teacher", CE(name="ce"), sets, None, out, device, resume)
