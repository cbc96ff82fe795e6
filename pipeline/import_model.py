"""Recipe: a complete run of a network that was trained elsewhere, from its weights alone."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from offline_bkd.pipeline import UserError, metrics, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.evaluate import answer
from offline_bkd.pipeline.models import ImageClassifier, build_model, classifier
from offline_bkd.pipeline.models.weights import find_network, nearest_part, part_under, read_tensors, required_names
from offline_bkd.pipeline.schema import Experiment
from offline_bkd.pipeline.show.terminal import counted
from offline_bkd.pipeline.training.samplers import occurrence
from offline_bkd.pipeline.yaml_files import read_text

TOLERANCE = 1.0  # points of test accuracy: less is within what another decoder or precision changes


def import_model(
    config: Experiment,
    weights: str,
    out: str,
    device: torch.device,
    prefix: str | None = None,
    classes: str | None = None,
    expected: float | None = None,
) -> dict:
    """Makes a complete run in the folder `out` of the network teacher.model with the tensors in the file `weights`.

    `prefix` says which part of the file, where several fit. The file's outputs stand in the order of the names in the file
    `classes`, or in the data's. Returns the scores on the test set.

    Raises UserError, before anything is written, where the weights do not fit, where the accuracy is further than TOLERANCE
    from `expected` percent, and, without an expectation, where another order of the classes would reach more.
    """
    runs.refuse_taken(out, resume=None)
    section = config.teacher
    if section.expert:
        raise UserError("an imported network answers for all classes; leave out teacher.expert")
    training_set, test_set, _ = datasets.load(config.data)
    order = class_order(classes, training_set.classes) if classes else None
    images = open_images(test_set, config.views, device, config.data.workers)
    model = build_model(
        section.model.without_weights(),
        len(training_set.classes),
        config.data,
        config.seed,
        images.crop_size,
        channels_last=section.training.channels_last,
    )
    path = Path(weights).expanduser()
    tensors = read_tensors(path)
    prefix, state = network_state(tensors, model.network, weights, prefix)
    model.network.load_state_dict(state, strict=False)  # but for counters, which no answer depends on, it is complete
    if order is not None:
        reorder_outputs(model, order)
    model.to(device)
    answers = answer(model, images, section.training.precision)
    scores = metrics.scores(answers, training_set.class_counts)
    refuse_unexpected(scores["top1"], expected)
    if expected is None:
        refuse_other_order(answers.predicted, answers.label, len(training_set.classes))
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with runs.start_run(out, config, "teacher", device, resume=None, learns_from=sha256) as run:
        mean, std = ([round(value, 4) for value in (part.flatten() / 255).tolist()] for part in (model.mean, model.std))
        run.log(f"imported {path.name}, part {prefix!r}, sha256 {sha256}")
        run.log(f"pixels are normalised by mean {mean} and standard deviation {std}")
        run.log(f"outputs are in the order of {Path(classes).name if classes else 'the classes of ' + training_set.name}")
        if left := [name for name in tensors if not name.startswith(prefix)]:
            run.log(f"note: left out of the file, as not of this network: {counted(len(left), 'tensor')}, {_some(left)}")
        run.log(f"test {scores['top1']:.2f}%; expected {'nothing' if expected is None else f'{expected:g}%'}")
        run.rewind_metrics(0)
        for checkpoint in ("last", "best"):
            run.save_tensors(checkpoint, model.state_dict(), epoch=0)
        run.write_summary(
            {
                "method": "imported",
                "classes": training_set.classes,
                "class_counts": training_set.class_counts.tolist(),
                "image_size": images.crop_size,
                "dataset": training_set.fingerprint,
                "test_dataset": test_set.fingerprint,
                "teacher": None,
                "source": {"file": path.name, "sha256": sha256, "prefix": prefix, "classes": classes and Path(classes).name},
                "seed": config.seed,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "last": {"epoch": 0, **scores},
                "best": {"epoch": 0, **scores},
                "digest": runs.digest(model.state_dict()),
            }
        )
    return scores


def network_state(
    tensors: Mapping[str, torch.Tensor], network: torch.nn.Module, weights: str, prefix: str | None
) -> tuple[str, dict[str, torch.Tensor]]:
    """The prefix of the part of a checkpoint that is `network`'s, and its tensors by their names there.

    Raises UserError if no part fits, by names and shapes, or if several do and no `prefix` says which.
    """
    own, required = network.state_dict(), required_names(network)
    parts = find_network(tensors, required)
    if prefix is not None:
        prefix = f"{prefix.removesuffix('.')}." if prefix else ""
        part = part_under(tensors, prefix)
    elif len(parts) > 1:
        raise UserError(f"{weights} holds the network {len(parts)} times; choose by --prefix one of {', '.join(parts)}")
    else:
        prefix, part = next(iter(parts.items())) if parts else nearest_part(tensors, required)
    differences = []
    if missing := [name for name in required if name not in part]:
        differences.append(f"it has no {_some(missing)}")
    if unknown := [name for name in part if name not in own]:
        differences.append(f"the network has no {_some(unknown)}")
    shapes = {name: (list(part[name].shape), list(own[name].shape)) for name in required if name in part}
    if changed := [f"{name} is {there}, not {here}" for name, (there, here) in shapes.items() if there != here]:
        differences.append(_some(changed))
    if broken := [name for name in required if name in part and not part[name].isfinite().all()]:
        differences.append(f"not all is finite in {_some(broken)}")
    if differences:
        where = f"{weights}, under {prefix!r}," if prefix else weights
        raise UserError(
            f"{where} is not of the network in teacher.model: {'; '.join(differences)}; configure the one it is of"
        )
    return prefix, part


def class_order(file: str, classes: tuple[str, ...]) -> np.ndarray:
    """For each of `classes`, its line in `file`: int64 [C]. Raises UserError if the names there are not the classes."""
    try:
        names = read_text(Path(file), limit=2**24).splitlines()
    except (OSError, UserError) as error:
        raise UserError(f"--classes {file} cannot be read ({error}); give a text file of a class name on each line")
    while names and not names[-1]:
        names.pop()
    line, known = {name: number for number, name in enumerate(names)}, set(classes)
    if repeated := [name for number, name in enumerate(names) if line[name] != number]:
        raise UserError(f"--classes {file} has {repeated[0]!r} twice; each class has one line")
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"--classes {file}: the data have no class {unknown[0]!r} ({counted(len(unknown), 'such name')}); use their names"
        )
    if missing := [name for name in classes if name not in line]:
        raise UserError(
            f"--classes {file} lacks the data's class {missing[0]!r} "
            f"({counted(len(missing), 'such class', 'such classes')}); add its line"
        )
    return np.array([line[name] for name in classes])


def reorder_outputs(model: ImageClassifier, order: np.ndarray) -> None:
    """Lets output c be what output `order`[c] was."""
    last = classifier(model)
    with torch.no_grad():
        for parameter in last.parameters():  # [C, D] or [C]
            parameter.copy_(parameter[torch.from_numpy(order)])


def refuse_unexpected(top1: float, expected: float | None) -> None:
    """Raises UserError if `top1` is further than TOLERANCE from what was expected."""
    if expected is not None and not abs(top1 - expected) <= TOLERANCE:
        raise UserError(
            f"the network is right about {top1:.2f}% of the test set, expected {expected:g}%: look at the order of its "
            "classes (--classes), at how pixels are normalised (data.mean, data.std) and at the size of images (views); "
            "nothing written"
        )


def refuse_other_order(predicted: np.ndarray, label: np.ndarray, classes: int) -> None:
    """Raises UserError if the outputs, named otherwise, would be right more often: by more than TOLERANCE and than chance.

    The best names are found on every second image of a class and judged on the others.
    """
    from scipy.optimize import linear_sum_assignment

    answered = np.zeros((classes, classes), np.float32)  # [label, output]
    judged = occurrence(label) % 2 == 1
    np.add.at(answered, (label[~judged], predicted[~judged]), 1)
    meant = np.empty(classes, np.int64)
    named, output = linear_sum_assignment(answered, maximize=True)
    meant[output] = named
    as_is, renamed = (answer[judged] == label[judged] for answer in (predicted, meant[predicted]))
    gained, lost = np.sum(renamed & ~as_is), np.sum(as_is & ~renamed)
    by_chance = 3 * (gained + lost) ** 0.5  # three standard deviations of their difference, were both as likely
    if gained - lost > max(by_chance, TOLERANCE / 100 * len(as_is)):
        raise UserError(
            f"the network's outputs seem to be in another order than the data's classes: {100 * as_is.mean():.2f}% of test "
            f"images are right, in another order {100 * renamed.mean():.2f}%; name the order by --classes FILE, or say by "
            "--expect which accuracy is right; nothing written"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" (and {len(names) - 3} more)" if len(names) > 3 else "")
