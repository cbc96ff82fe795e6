"""The only training loop: gradient descent over numbered views, resumable to the same bits.

What differs between methods comes in as one object, which says what a step runs, which rows an epoch visits and what is
minimised (methods/). Left out: data (data/), optimisers and schedules (optimisation.py), what a run writes (runs/).
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from offline_bkd.cache import CropFlip, RandomResizedCrop, philox
from offline_bkd.pipeline import NotFinite, UserError, runs
from offline_bkd.pipeline.data.images import Batch, ImageSource
from offline_bkd.pipeline.device import device_name, peak_memory
from offline_bkd.pipeline.schema import Training
from offline_bkd.pipeline.show.progress import Progress
from offline_bkd.pipeline.show.terminal import counted
from offline_bkd.pipeline.training import samplers
from offline_bkd.pipeline.training.methods.contract import Method
from offline_bkd.pipeline.training.optimisation import Optimisation, learning_rate
from offline_bkd.pipeline.training.ranks import ALONE, Ranks
from offline_bkd.pipeline.training.targets import Targets

WARM_UP = 5  # steps that the rate of a command's first epoch leaves out: compilation, choice of algorithms, first memory
CHECK_EVERY = 50  # steps between looks at the device: often enough to stop a diverged run, rarely enough to cost nothing


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learnt, from what, and how it is judged."""

    model: torch.nn.Module  # what is saved and evaluated
    network: torch.nn.Module  # what a step runs and a resumed run goes on with: the method's network, perhaps jittered
    method: Method
    images: ImageSource  # of the training part
    sample_id: np.ndarray  # int64 [N]
    views: CropFlip | RandomResizedCrop
    targets: Targets | None  # of the cache that the method learns from
    evaluate: Callable[[torch.nn.Module], dict]  # -> metrics.scores on the test part
    validate: Callable[[torch.nn.Module], dict] | None  # likewise on what was held out of the training part, to choose by
    training: Training
    seed: int
    ranks: Ranks = ALONE  # the processes that train together


def train(task: Task, run: runs.Run, about: dict, track: Callable[[dict], None] = lambda record: None) -> None:
    """Trains to the last epoch, from the run's state if it has one, and writes the run's summary.

    After every epoch the weights and the optimiser's state are on disk; the first rank writes. Raises NotFinite, which
    says where training diverged; the last epoch's files stay. `about` (method, classes, class_counts, …) goes into the
    summary, every epoch's record to `track`.
    """
    if run.has("summary.json"):
        run.log(f"the run in {run.folder} is complete")
        return
    training, model, ranks = task.training, task.model, task.ranks
    parameters = sum(parameter.numel() for parameter in model.parameters())
    classes = sum(count > 0 for count in about["class_counts"])
    run.log(
        f"{about['method']}: {parameters:,} parameters, {counted(len(task.sample_id), 'sample')} "
        f"of {counted(classes, 'class', 'classes')}, {device_name(task.images.device)}"
    )
    optimisation = Optimisation(task.network, model, training)
    first, best = _resume(run, task, optimisation)
    mode = "reduce-overhead" if training.compile == "cuda_graphs" else "default"
    network = ranks.together(task.network, task.images.device)
    # a graph for each size of batch: one for any size would replace the full batches' after the first short one
    forward = torch.compile(network, mode=mode, dynamic=False) if training.compile else network
    with Progress(f"{run.label}training", training.epochs, first, "epochs", shown=ranks.first) as progress:
        for epoch in range(first, training.epochs):
            answering, scores, better = optimisation.averaged or model, {}, False
            try:
                record: dict = {"epoch": epoch + 1, **train_epoch(task, forward, optimisation, epoch, first)}
                ranks.agree(answering)
                if (epoch + 1) % training.evaluate_every == 0 or epoch + 1 == training.epochs:
                    start = time.perf_counter()
                    scores = _scores(task, answering, epoch)
                    record |= scores | {"evaluation_seconds": time.perf_counter() - start}
            except NotFinite as error:
                raise NotFinite(f"{run.label}{error}") from None
            if scores:  # the best epoch is chosen by what was held out, if anything was; its test scores stand beside
                test = scores.pop("test")
                better = scores.get("validation", test)["top1"] > best.get("validation", best)["top1"]
                if better:
                    best = {"epoch": epoch + 1, **test, **scores}
            if not ranks.first:
                continue
            run.append_metrics(record)
            run.save_tensors("last", answering.state_dict(), epoch=epoch + 1)
            run.save_tensors("state", optimisation.state(), epoch=epoch + 1, best=best, processes=ranks.world)
            if better:  # last, so that it is never of an epoch that a resumed run does again; see _resume
                run.save_tensors("best", answering.state_dict(), epoch=epoch + 1)
            track(record)
            progress.advance(record["images_per_second"], "images/s")
            run.log(_line(record, training.epochs))
    if not ranks.first:
        return
    records = run.metrics(training.epochs)
    run.write_summary(
        {
            **about,
            "seed": task.seed,
            "parameters": parameters,
            "last": {"epoch": training.epochs, **records[-1]["test"]},
            "best": best,
            "best_by": "validation" if task.validate else "test",
            "seconds": sum(record["seconds"] + record.get("evaluation_seconds", 0) for record in records),
            "data_share": float(np.mean([record["data_share"] for record in records])),
            "peak_memory": peak_memory(task.images.device),
            "digest": runs.digest((optimisation.averaged or model).state_dict()),
        }
    )


def train_epoch(
    task: Task, forward: Callable[[torch.Tensor], object], optimisation: Optimisation, epoch: int, first: int | None = None
) -> dict[str, float]:
    """One pass over the rows of `epoch`; returns what is recorded of it.

    In the epoch `first`, images_per_second leaves out the first steps, which warm up.
    The host waits for the device only every CHECK_EVERY steps; in every step, too, where there is a moving average (of torch's
    own making), where targets stayed in the host's memory, and of several processes on GPUs in each layer that synchronises
    batch statistics.
    """
    training, device, ranks, start = task.training, task.images.device, task.ranks, time.perf_counter()
    # what a network draws itself (dropout, stochastic depth) follows from seed and epoch too; of two words of 32 bits one seed
    high, low, *_ = philox.draw(task.seed, philox.DROPOUT, epoch, ranks.rank)
    torch.manual_seed((int(high) << 31) + int(low))
    rows, views = _draw(task, epoch)
    share = ranks.share(rows, views, training.batch_size)
    if task.targets:
        drawn = share.rows, share.views
        following = ranks.share(*_draw(task, epoch + 1), training.batch_size) if epoch + 1 < training.epochs else share
        task.targets.prepare(drawn, (following.rows, following.views))
    steps = math.ceil(len(rows) / training.batch_size)
    sums: dict[str, torch.Tensor] = {}
    first_bad = torch.full((), steps, device=device)  # first step of the epoch whose loss was not finite
    task.network.train()
    waited, settled = [0.0], WARM_UP if epoch == first and steps > 2 * WARM_UP else 0
    settled_at = start
    for step, batch in enumerate(_timed(task.images.batches(share.rows, share.views, share.batch_size), waited)):
        if step == settled > 0:
            settled_at = time.perf_counter()
        rate = learning_rate(training, epoch * steps + step, steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
            output = forward(batch.images)
        terms = task.method.loss(output, batch, epoch)
        idle = step == share.idle_step
        loss = ranks.mean(terms, min(training.batch_size, len(rows) - step * training.batch_size), idle)
        optimisation.step(loss, rate)
        with torch.no_grad():
            recorded = {"loss": terms.loss, "correct": terms.correct, **terms.parts}
            if terms.weight is not None:
                recorded |= {"loss": terms.weight * terms.loss, "weight": terms.weight}
            for name, values in recorded.items():
                sums[name] = sums.get(name, 0) + (0 * values if idle else values).sum()
            first_bad = torch.where(loss.isfinite() | (first_bad < step), first_bad, step)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            _check(task, int(ranks.least(first_bad)), rows, epoch, steps)
    if not all(bool(parameter.isfinite().all()) for parameter in task.model.parameters()):
        _check(task, steps - 1, rows, epoch, steps)  # the last step's loss was finite, what it did was not
    end = time.perf_counter()
    seconds = end - start
    totals = {name: float(ranks.sum(value)) for name, value in sums.items()}
    correct, weight = totals.pop("correct"), totals.pop("weight", len(rows))
    return {
        "loss": totals.pop("loss") / weight,
        **{name: total / len(rows) for name, total in totals.items()},
        "train_top1": 100 * correct / len(rows),
        "learning_rate": rate,
        "seconds": seconds,
        "data_share": waited[0] / seconds,  # of the time, in which the host waited for batches or cropped them
        "images_per_second": (len(rows) - settled * training.batch_size) / (end - settled_at),
    }


def _timed(batches: Iterator[Batch], waited: list[float]) -> Iterator[Batch]:
    """The same batches; adds the seconds that getting them took to `waited[0]`."""
    batches = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        waited[0] += time.perf_counter() - start
        if batch is None:
            return
        yield batch


def _draw(task: Task, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows that an epoch visits, in order, and the view of each.

    With m views a decode, m epochs are the parts of one order, in which every row comes m times in a row. Together they
    visit the same views of the same samples as m epochs of one view a decode.
    """
    several = task.training.views_per_decode
    first = epoch - epoch % several
    rows = np.repeat(task.method.rows(first), several)
    count = len(rows) // several
    part = slice((epoch - first) * count, (epoch - first + 1) * count)
    return rows[part], task.views.draw(task.seed, first, task.sample_id[rows[part]], samplers.occurrence(rows)[part])


def _check(task: Task, bad: int, rows: np.ndarray, epoch: int, steps: int) -> None:
    if bad >= steps:
        return
    size = task.training.batch_size
    ids = task.sample_id[rows[bad * size : (bad + 1) * size]].tolist()
    rate = learning_rate(task.training, epoch * steps + bad, steps)
    raise NotFinite(
        f"training diverged (not finite) at epoch {epoch + 1}, step {epoch * steps + bad}, learning rate {rate:.4g}; "
        f"{_kept(epoch)}; lower the learning rate, or look at samples {', '.join(map(str, ids))}"
    )


def _kept(epoch: int) -> str:
    return f"the checkpoint of epoch {epoch} is kept" if epoch else "no epoch was finished"


def _scores(task: Task, answering: torch.nn.Module, epoch: int) -> dict[str, dict]:
    """On the test part, and before it on what was held out, if anything was. Raises NotFinite."""
    try:
        held_out = {"validation": task.validate(answering)} if task.validate else {}
        return held_out | {"test": task.evaluate(answering)}
    except NotFinite as error:  # of running statistics that have overflowed, say
        raise NotFinite(
            f"training diverged at epoch {epoch + 1}: {error}, though its loss is; {_kept(epoch)}; lower the learning rate"
        ) from None


def _resume(run: runs.Run, task: Task, optimisation: Optimisation) -> tuple[int, dict]:
    """The first epoch to train, from 0, and the best scores so far; loads the state that an interrupted run left."""
    first, best = 0, {"epoch": None, "top1": -1.0}
    if run.has("state.safetensors"):
        tensors, metadata = run.load_tensors("state")
        optimisation.load_state(tensors)
        first, best = metadata["epoch"], metadata["best"]
        run.log(f"resumed after epoch {first} of {task.training.epochs}")
        if (before := metadata.get("processes", 1)) != task.ranks.world:
            run.log(
                f"note: trained by {counted(before, 'process', 'processes')} until here and by {task.ranks.world} from here: "
                "results differ in last bits, "
                "and on CPUs by batch statistics"
            )
    elif run.has("last.safetensors") and len(run.metrics()) > 1:  # one: it ended before its state was written
        raise UserError(f"{run.folder} has lost state.safetensors, which --resume needs; restore it, or name another folder")
    if task.ranks.first:
        run.rewind_metrics(first)
        if best["epoch"] == first:  # it ended between the two files, perhaps: then the last epoch's is the best's
            if not run.has("best.safetensors") or run.load_tensors("best")[1]["epoch"] != first:
                run.save_tensors("best", run.load_tensors("last")[0], epoch=first)
    if int(task.ranks.least(torch.tensor(first, device=task.images.device))) != first:
        raise UserError(f"the processes do not see the same run in {run.folder}; put it where all of them can read it")
    return first, best


def _line(record: dict, epochs: int) -> str:
    parts = [f"epoch {record['epoch']}/{epochs}", f"loss {record['loss']:.4f}", f"train {record['train_top1']:.1f}%"]
    if validation := record.get("validation"):
        parts.append(f"validation {validation['top1']:.2f}%")
    if test := record.get("test"):
        groups = " ".join(f"{name} {test[name]:.1f}" for name in ("many", "medium", "few") if test[name] is not None)
        parts.append(f"test {test['top1']:.2f}% ({groups})")
    parts.append(f"{record['images_per_second']:.0f} images/s")
    return "  ".join(parts)
