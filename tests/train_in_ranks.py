"""Two epochs of a network without batch statistics in float64, alone or, started by torchrun, in ranks: losses, weights and
scores. Every epoch visits 257 samples in batches of 64, so that the last batch has one image, and some ranks none.

Started by torchrun also a run of one epoch of the tiny network, which has batch statistics.
"""

import sys
from dataclasses import replace

import tiny
import torch
from torch import nn

from offline_bkd.cache import CropFlip
from offline_bkd.pipeline import schema
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import ResidentImages
from offline_bkd.pipeline.evaluate import evaluate
from offline_bkd.pipeline.train import train_student
from offline_bkd.pipeline.training import engine
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.training.optimisation import Optimisation
from offline_bkd.pipeline.training.ranks import ALONE, Ranks, join

CPU = torch.device("cpu")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.convolution(images.double() / 255).relu().mean((2, 3)))


class Answers:
    """Of a teacher, to every sample under 18 views: what a method asks of `Targets`."""

    temperature = 2.0

    def __init__(self, samples: int):
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(samples, 18, 10, generator=generator, dtype=torch.float64).softmax(2)

    def prepare(self, drawn, later):
        self.held = set(zip(*(part.tolist() for part in drawn)))

    def probability(self, rows, views, temperature):
        assert self.held >= set(zip(rows.tolist(), views.tolist())), "a step asks for what was prepared"
        return self.table[rows, views]


def train(ranks: Ranks, settings: schema.MethodSection) -> dict:
    data = schema.Digits(name="digits", imbalance_ratio=20, max_per_class=136)
    training_set, test_set, _ = datasets.load(data)
    targets = Answers(len(training_set))
    views = CropFlip(pad=1)
    images = ResidentImages(training_set, views, CPU)
    torch.manual_seed(0)
    model = Network().double()
    context = Context(
        model=model,
        sample_id=training_set.sample_id,
        label=training_set.label,
        class_counts=training_set.class_counts,
        targets=targets,
        epochs=2,
        seed=3,
        device=CPU,
    )
    method = build_method(settings, context)
    if settings.name == "bkd":
        method.weights = method.weights.double()
    elif settings.name == "cb":
        method.weights = replace(method.weights, by_class=method.weights.by_class.double())
    visits = method.rows
    method.rows = lambda epoch: visits(epoch)[:257]
    training = schema.Training(epochs=2, batch_size=64, learning_rate=0.05)
    task = engine.Task(
        model=model,
        network=model,
        method=method,
        images=images,
        sample_id=training_set.sample_id,
        views=views,
        targets=targets,
        evaluate=None,
        validate=None,
        training=training,
        seed=3,
    )
    task, optimisation = replace(task, ranks=ranks), Optimisation(model, model, training)
    forward = ranks.together(model, CPU)
    losses = [engine.train_epoch(task, forward, optimisation, epoch)["loss"] for epoch in range(2)]
    scores = evaluate(model, ResidentImages(test_set, views, CPU), training_set.class_counts, ranks=ranks)
    judged = torch.tensor([scores["top1"], *scores["per_class"]])
    return {"loss": torch.tensor(losses, dtype=torch.float64), "judged": judged, **model.state_dict()}


def trained(ranks: Ranks = ALONE) -> dict[str, dict]:
    settings = schema.CE(name="ce"), schema.CB(name="cb"), schema.BKD(name="bkd")
    return {one.name: train(ranks, one) for one in settings}


if __name__ == "__main__":
    ranks = join(CPU)
    result = trained(ranks)
    if ranks.first:
        torch.save(result, sys.argv[1])
    train_student(tiny.experiment("student.method={name: ce}", "student.training.epochs=1"), None, sys.argv[2], CPU)
    ranks.wait()
