"""What an evaluation found: a few lines for a person, and files with every class and every confusion.

scores.json        the scores, calibration and worst confusions, with what was evaluated
classes.csv        a line a class: training samples, shot group, test images, accuracies, what it is most taken for
confusion.csv      a line a pair of classes: how many images of the one were taken for the other, errors first
confusion.png      the same as a picture, with the worst pairs by name
calibration.png    accuracy over confidence, overall and by shot group
"""

from pathlib import Path

import numpy as np
from pydantic import BaseModel, FiniteFloat, NonNegativeInt

from offline_bkd.cache.shots import SHOTS, shot_groups
from offline_bkd.pipeline import UserError, metrics, runs
from offline_bkd.pipeline.evaluate import Evaluation
from offline_bkd.pipeline.show import pictures, tables, terminal

WORST = 20  # pairs of classes that are named in the picture and in the report
SAID = 5  # those that are printed
FILES = "scores.json", "classes.csv", "confusion.csv", "confusion.png", "calibration.png"


class Bin(BaseModel):
    images: NonNegativeInt
    confidence: FiniteFloat | None
    accuracy: FiniteFloat | None


class WorstPair(BaseModel):
    label: str
    predicted: str
    images: NonNegativeInt
    share: FiniteFloat  # of the label's test images, in percent


class KeptEvaluation(BaseModel):
    """What a report reads of scores.json."""

    checkpoint: str
    digest: str
    test_dataset: dict
    precision: str | None = None  # earlier versions did not say it
    calibration: dict[str, list[Bin]]
    worst_pairs: list[WorstPair]


def default_folder(run: runs.Run, checkpoint: str) -> Path:
    """Where the evaluation of a checkpoint on the run's own test set is kept."""
    return run.folder / f"evaluation-{checkpoint}"


def kept_evaluation(run: runs.Run) -> KeptEvaluation | None:
    """The evaluation of a complete run's last epoch on its own test set, where there is one."""
    path = default_folder(run, "last") / "scores.json"
    if not path.exists():
        return None
    try:
        kept = KeptEvaluation.model_validate(runs.read_json(path, KeptEvaluation))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({runs.reason(error)}); evaluate {run.folder} again")
    summary, precision = run.summary(), run.config().network(run.stage).training.precision
    own = (kept.digest, kept.test_dataset) == (summary["digest"], summary["test_dataset"])
    return kept if own and kept.precision in (None, precision) else None


def worst_pairs(evaluation: Evaluation, pairs: metrics.Pairs) -> list[dict]:
    """The WORST pairs of classes by images of the one that were taken for the other, as in scores.json."""
    tested = np.bincount(evaluation.answers.label, minlength=len(evaluation.classes))
    wrong = np.flatnonzero(pairs.label != pairs.predicted)[:WORST]
    return [
        {
            "label": evaluation.classes[pairs.label[index]],
            "predicted": evaluation.classes[pairs.predicted[index]],
            "images": int(pairs.images[index]),
            "share": 100 * float(pairs.images[index] / tested[pairs.label[index]]),
        }
        for index in wrong
    ]


def make_folder(folder: Path, run: runs.Run, checkpoint: str, test_dataset: dict | None = None) -> None:
    """Makes a folder for the files. Raises UserError where it holds others: another network's, or of another test set than
    `test_dataset`, where that is known yet."""
    runs.make_folder(folder, FILES)
    path = folder / "scores.json"
    if not path.exists():
        return
    try:
        kept = runs.read_json(path, KeptEvaluation)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, or no evaluation ({runs.reason(error)}); move it away, or name another --out")
    summary = run.summary()
    if kept["digest"] != (summary["digest"] if checkpoint == "last" else summary.get("best_digest", kept["digest"])):
        raise UserError(f"--out {folder} holds the evaluation of another network than {run.folder}'s; name another folder")
    if test_dataset not in (None, kept["test_dataset"]):
        raise UserError(f"--out {folder} holds an evaluation on other test images; name another folder")


def keep_evaluation(evaluation: Evaluation, out: str | None) -> str:
    """Writes the files into `out`, or beside the run's weights if the test set is its own. Returns a line that says where.

    Without `out`, a run that lies where nothing can be written is no error.
    """
    folder = Path(out) if out else default_folder(evaluation.run, evaluation.checkpoint)
    if not out and evaluation.test_dataset != evaluation.run.summary()["test_dataset"]:
        return "not written, for these are other test images than the run's own; --out names a folder for it"
    if not out and evaluation.precision != evaluation.run.config().network(evaluation.run.stage).training.precision:
        return f"not written, for {evaluation.precision} is not the run's own precision; --out names a folder for it"
    try:
        if out:
            make_folder(folder, evaluation.run, evaluation.checkpoint, evaluation.test_dataset)
        else:
            runs.make_folder(folder)
        _write(evaluation, folder)
    except (UserError, OSError) as error:
        if out:
            raise
        return f"not written: {error}"
    return f"every class and every confusion: {folder}"


def _write(evaluation: Evaluation, folder: Path) -> None:
    pairs = metrics.confusion(evaluation.answers, len(evaluation.classes))
    bins = metrics.calibration(evaluation.answers, evaluation.class_counts)
    worst = worst_pairs(evaluation, pairs)
    content = {
        "checkpoint": evaluation.checkpoint,
        "digest": evaluation.digest,
        "test_dataset": evaluation.test_dataset,
        "test_images": len(evaluation.answers.label),
        "precision": evaluation.precision,
        "scores": evaluation.scores,
        "calibration": bins,
        "worst_pairs": worst,
    }
    runs.write_json(folder / FILES[0], content)  # first: it says whose the folder is, also after an interruption
    tables.write_csv(folder / "classes.csv", _class_rows(evaluation, pairs))
    tables.write_csv(folder / "confusion.csv", _confusion_rows(evaluation, pairs))
    pictures.save_confusion(folder / "confusion.png", pairs, evaluation.class_counts, evaluation.classes, worst)
    tested = {
        f"{group}-shot" if group != "all" else group: part for group, part in bins.items() if any(b["images"] for b in part)
    }
    pictures.save_png(
        folder / "calibration.png", [lambda axes: pictures.plot_calibration(axes, "calibration", tested)], (5, 5)
    )


def print_evaluation(evaluation: Evaluation) -> None:
    """A sentence, the scores by shot group, and the worst confusions."""
    scores = evaluation.scores
    images = len(evaluation.answers.label)
    groups = ", ".join(f"{group}-shot {scores[group]:.1f}" for group in SHOTS if scores[group] is not None)
    where = f"{evaluation.run.folder} ({evaluation.checkpoint} epoch)"
    columns = ["all", *SHOTS]
    rows = [
        ["%", *columns],
        ["top-1", *(tables.percent(scores[key]) for key in terminal.COLUMNS.values())],
        ["top-5", *(tables.percent(scores["top5"][group]) for group in columns)],
        ["calibration error (ECE)", *(tables.percent(scores["ece"][group]) for group in columns)],
    ]
    terminal.table(rows, f"{where}: {scores['top1']:.1f} % of {images:,} test images are right ({groups})")
    worst = worst_pairs(evaluation, metrics.confusion(evaluation.answers, len(evaluation.classes)))[:SAID]
    for pair in worst:
        images = terminal.counted(pair["images"], "image")
        terminal.sentence(f"{images} of {pair['label']!r} ({pair['share']:.0f} %) taken for {pair['predicted']!r}")


def _class_rows(evaluation: Evaluation, pairs: metrics.Pairs) -> list[list[str]]:
    answers, counts, classes = evaluation.answers, evaluation.class_counts, evaluation.classes
    groups = shot_groups(counts)
    tested = np.bincount(answers.label, minlength=len(classes))
    top1 = metrics.accuracy_by_class(answers.predicted == answers.label, answers.label, len(classes))
    top5 = metrics.accuracy_by_class(answers.in_top5, answers.label, len(classes))
    most = {}  # class: (the one it is most often taken for, images)
    for label, predicted, images in zip(pairs.label, pairs.predicted, pairs.images):
        if label != predicted:
            most.setdefault(label, (classes[predicted], str(images)))
    heading = ["class", "training_samples", "shots", "test_images", "top1", "top5", "most_taken_for", "images_taken_for_it"]
    return [heading] + [
        [
            name,
            str(counts[index]),
            next(group for group, members in groups.items() if members[index]) if counts[index] else "",
            str(tested[index]),
            *("" if np.isnan(value) else f"{value:.2f}" for value in (top1[index], top5[index])),
            *most.get(index, ("", "0")),
        ]
        for index, name in enumerate(classes)
    ]


def _confusion_rows(evaluation: Evaluation, pairs: metrics.Pairs) -> list[list[str]]:
    names = np.array(evaluation.classes, object)
    return [["class", "predicted", "images"], *zip(names[pairs.label], names[pairs.predicted], map(str, pairs.images))]
