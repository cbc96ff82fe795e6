"""Recipe: train a teacher on the long-tailed set with cross-entropy, or on the classes of one shot group: an expert."""

import torch

from offline_bkd.pipeline import runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.recipe import open_data, train_network
from offline_bkd.pipeline.schema import CE, Experiment
from offline_bkd.pipeline.training.engine import finish


def train_teacher(config: Experiment, out: str, device: torch.device, resume: bool = False) -> None:
    """Trains the teacher of `config` into the folder `out`.

    An expert (LFME) sees, and is judged on, the images of its own classes alone, among which it answers.
    """
    runs.refuse_taken(out, resume)
    data = open_data(config, datasets.load(config.data, config.teacher.expert), device)
    finish(train_network(config, "teacher", CE(name="ce"), data, out, device, resume))
