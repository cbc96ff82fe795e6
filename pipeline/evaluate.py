"""A model's logits over a data set, and their scores."""

import numpy as np
import torch

from offline_bkd.pipeline import UserError, metrics, runs, schema
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


def evaluate(
    model: torch.nn.Module, images, class_counts: np.ndarray, precision: str = "float32", ranks: Ranks = ALONE
) -> dict:
    """`metrics.scores` of `model` on every image of the source, by the training set's `class_counts` [C].

    Each of `ranks` answers for a share of the images.
    """
    label = images.label.cpu().numpy()
    rows = np.array_split(np.arange(len(label)), ranks.world)[ranks.rank]
    predicted = ranks.gather(infer(model, images, rows, precision=precision).argmax(1)).cpu().numpy()
    return metrics.scores(predicted, label, class_counts)


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


def evaluate_run(folder: str, checkpoint: str, overrides: tuple[str, ...], device: torch.device) -> dict:
    """Scores of a complete run's checkpoint on its test set, or another that `overrides` name, computed again.

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
    trained, found = (" x ".join(map(str, size)) for size in (summary.get("image_size", images.crop_size), images.crop_size))
    if trained != found:
        raise UserError(
            f"the network in {folder} was trained on images of {trained} pixels, found {found}; score it on images that large"
        )
    precision = experiment.network(run.stage).training.precision
    return evaluate(model, images, class_counts, precision)


def _trained_as(experiment: schema.Experiment, stage: str) -> dict:
    """What made the network of `stage` what it is: all but where images lie and the precision it runs in."""
    values = experiment.model_dump(mode="json")
    del values[stage]["training"]["precision"]
    # of the data, what was drawn of them and how the network sees their pixels
    values["data"] = {key: values["data"][key] for key in ("imbalance_ratio", "max_per_class", "seed", "mean", "std")}
    return values
