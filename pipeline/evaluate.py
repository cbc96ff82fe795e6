"""A model's logits over a data set, and their scores."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from offline_bkd.pipeline import NotFinite, UserError, metrics, runs, schema
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.training.ranks import ALONE, Ranks


@torch.inference_mode()
def infer(model: torch.nn.Module, images, rows: np.ndarray, views=None, batch_size: int = 500, precision: str = "float32"):
    """Logits, float32 [M, C] on the device, of `rows` [M] under `views` [M] (None: whole images), in evaluation mode.

    `images` is a source of pipeline.data.images. The model is left in the mode it was in.
    """
    training = model.training
    model.eval()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        logits = torch.cat([model(batch.images) for batch in images.batches(rows, views, batch_size)])
    model.train(training)
    return logits


def answers_of(logits: torch.Tensor, label: torch.Tensor, ranks: Ranks = ALONE) -> metrics.Answers:
    """What `logits` [M, C] say of images whose classes are `label` [M]; of several `ranks`, of the images of all of them."""
    logits, label = logits.float(), label.to(logits.device)
    predicted = logits.argmax(1)
    columns = {
        "label": label,
        "predicted": predicted,
        "confidence": logits.softmax(1).gather(1, predicted[:, None])[:, 0],
        "in_top5": (logits.topk(min(5, logits.shape[1])).indices == label[:, None]).any(1),
    }
    return metrics.Answers(**{name: ranks.gather(values).cpu().numpy() for name, values in columns.items()})


def answer(model: torch.nn.Module, images, precision: str = "float32", ranks: Ranks = ALONE) -> metrics.Answers:
    """What `model` answers about every image of the source. Each of `ranks` looks at a share of the images.

    Raises NotFinite.
    """
    rows = np.array_split(np.arange(len(images.label)), ranks.world)[ranks.rank]
    logits = infer(model, images, rows, precision=precision)
    answers = answers_of(logits, images.label[torch.from_numpy(rows).to(images.label.device)], ranks)
    if not np.isfinite(answers.confidence).all():
        raise NotFinite("the network's answers are not finite")
    return answers


def evaluate(
    model: torch.nn.Module, images, class_counts: np.ndarray, precision: str = "float32", ranks: Ranks = ALONE
) -> dict:
    """`metrics.scores` of `answer`, by the training set's `class_counts` [C]."""
    return metrics.scores(answer(model, images, precision, ranks), class_counts)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A run's checkpoint, asked about a test set."""

    run: runs.Run
    checkpoint: str  # "last" or "best"
    digest: str  # of its weights
    test_dataset: dict  # the test set's fingerprint
    classes: tuple[str, ...]
    class_counts: np.ndarray  # int64 [C], training samples
    precision: str  # in which the network ran
    answers: metrics.Answers

    @cached_property
    def scores(self) -> dict:
        return metrics.scores(self.answers, self.class_counts)


def load_model(run: runs.Run, checkpoint: str, experiment: schema.Experiment, classes: int) -> torch.nn.Module:
    """The run's model at `checkpoint` ("last" or "best"), on the CPU."""
    trained = experiment.network(run.stage)
    section, layout = trained.model.without_weights(), trained.training.channels_last  # the checkpoint has all weights
    members = torch.ones(classes, dtype=torch.bool) if trained.expert else None  # which, the checkpoint says
    size = run.summary().get("image_size")
    model = build_model(section, classes, experiment.data, 0, size, members, layout)
    tensors, _ = run.load_tensors(checkpoint)
    try:
        model.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(f"{checkpoint}.safetensors in {run.folder} does not fit its config.yaml; restore both or train again")
    described = run.summary()["digest"] if checkpoint == "last" else run.summary().get("best_digest")
    if described and runs.digest(model.state_dict()) != described:  # runs of earlier versions tell of their last alone
        raise UserError(
            f"{checkpoint}.safetensors in {run.folder} is not the checkpoint its summary.json describes; train again"
        )
    return model.eval()


def refuse_size(run: runs.Run, size: tuple[int, int]) -> None:
    """Raises UserError where the run's network is for images of another `size`, (height, width) in pixels."""
    trained, found = (" x ".join(map(str, sides)) for sides in (run.summary().get("image_size", size), size))
    if trained != found:
        raise UserError(
            f"the network in {run.folder} is for images of {trained} pixels, found {found}; give it images that large"
        )


def ask_run(folder: str, checkpoint: str, overrides: tuple[str, ...], device: torch.device) -> Evaluation:
    """Asks a complete run's checkpoint about its test set, or another that `overrides` name.

    Shot groups, and an expert's classes, are those of the training set that the network was trained on.
    """
    run = runs.open_run(folder)
    experiment, summary = run.config(overrides), run.summary()
    if changed := runs.difference(_trained_as(run.config(), run.stage), _trained_as(experiment, run.stage)):
        raise UserError(
            f"the network in {folder} is scored as it was trained, but {changed}; "
            f"-o may say where its test images are (data) and {run.stage}.training.precision"
        )
    _, test_set, _ = datasets.load(experiment.data)
    if tuple(summary["classes"]) != test_set.classes:
        raise UserError(f"the network in {folder} knows other classes than {test_set.name}; use the data it was trained on")
    class_counts = np.array(summary["class_counts"])
    test_set = test_set.take(np.flatnonzero(class_counts[test_set.label]))  # an expert is asked about its own classes
    if not len(test_set):
        raise UserError(f"{test_set.name} has no test image of a class that the expert in {folder} knows; name others")
    model = load_model(run, checkpoint, experiment, len(test_set.classes)).to(device)
    images = open_images(test_set, experiment.views, device, experiment.data.workers)
    refuse_size(run, images.crop_size)
    precision = experiment.network(run.stage).training.precision
    return Evaluation(
        run=run,
        checkpoint=checkpoint,
        digest=runs.digest(model.state_dict()),
        test_dataset=test_set.fingerprint,
        classes=test_set.classes,
        class_counts=class_counts,
        precision=precision,
        answers=answer(model, images, precision),
    )


def _trained_as(experiment: schema.Experiment, stage: str) -> dict:
    """What made the network of `stage` what it is: all but where images lie and the precision it runs in."""
    values = experiment.model_dump(mode="json", exclude={stage: {"training": {"precision"}}})
    return {**values, "data": experiment.data.model_dump(mode="json", include=schema.DRAWN | schema.PIXELS)}
