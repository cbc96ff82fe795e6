"""The only training loop: stochastic gradient descent over numbered views, resumable to the same bits.

What differs between methods comes in as two functions: which rows an epoch visits, and the loss of a batch.
Training is a generator that pauses after every step, so that several networks can be trained in turns (`in_turns`).
Left out: data (data/), losses (losses.py), what a run writes (runs.py).
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from offline_bkd.cache import philox
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data.images import Batch
from offline_bkd.pipeline.schema import Training
from offline_bkd.pipeline.show.progress import Progress
from offline_bkd.pipeline.training import samplers

CHECK_EVERY = 50  # steps between looks at the device: often enough to stop a diverged run, rarely enough to cost nothing


class NotFinite(RuntimeError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be learnt, from what, and how it is judged."""

    model: torch.nn.Module  # what is saved and evaluated
    network: torch.nn.Module  # what a step runs and a resumed run goes on with: the model, or what a method makes of it
    images: object  # a source of pipeline.data.images, of the training part
    sample_id: np.ndarray  # int64 [N]
    views: object  # a specification of cache.views
    rows: Callable[[int], np.ndarray]  # epoch -> the rows that it visits, in order
    loss: Callable[[object, Batch, int], dict[str, torch.Tensor]]  # output, batch, epoch -> {"loss", "correct", parts: [B]}
    prepare: Callable[[np.ndarray, np.ndarray], None]  # called before each epoch with its views and the next one's
    evaluate: Callable[[torch.nn.Module], dict]  # -> metrics.scores on the test part
    training: Training
    seed: int


def learning_rate(training: Training, step: int, steps_per_epoch: int) -> float:
    """The learning rate of `step` (from 0 over the whole run)."""
    schedule, base, total = training.schedule, training.learning_rate, training.epochs * steps_per_epoch
    if schedule.name == "constant":
        return base
    if schedule.name == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * step / total))
    if schedule.name == "one_cycle":
        rise = schedule.warmup * total
        return base * ((step + 1) / (rise + 1) if step < rise else (total - step) / (total - rise))
    epoch = step // steps_per_epoch
    if epoch < schedule.warmup_epochs:
        return base * (epoch + 1) / schedule.warmup_epochs
    return base * schedule.gamma ** sum(epoch >= milestone for milestone in schedule.milestones)


def finish(work: Generator):
    """Runs `work` to its end without a pause; what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            return stop.value


def in_turns(trainings: list[Generator], device: torch.device) -> None:
    """Runs all `trainings` to their ends, a step of each in turn, each as if it were alone: the same bits on the CPU.

    On a GPU each has a stream of its own. One that diverges leaves the others to their ends; then its NotFinite is raised.
    """
    waiting = deque((training, _Turn(device)) for training in trainings)
    diverged = None
    while waiting:
        training, turn = waiting.popleft()
        try:
            with turn:
                next(training)
        except StopIteration:
            continue
        except NotFinite as error:
            print(error, flush=True)  # the others may take long
            diverged = diverged or error
            continue
        waiting.append((training, turn))
    if diverged:
        raise diverged


class _Turn:
    """A context in which one of several networks is trained: its own random numbers and, on a GPU, its own stream."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.cuda else None
        if self.cuda:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # what they share has been put there
        self.state = None

    def __enter__(self) -> None:
        if self.state is not None:
            torch.set_rng_state(self.state[0])
            if self.cuda:
                torch.cuda.set_rng_state(self.state[1], self.stream.device)
        self.entered = torch.cuda.stream(self.stream) if self.cuda else nullcontext()
        self.entered.__enter__()

    def __exit__(self, *error) -> None:
        self.entered.__exit__(*error)
        self.state = torch.get_rng_state(), torch.cuda.get_rng_state(self.stream.device) if self.cuda else None


def train_in_steps(task: Task, run: runs.Run, about: dict) -> Generator[None, None, None]:
    """Trains to the last epoch, from the run's state if it has one, and writes the run's summary; pauses after every step.

    After every epoch the weights and the optimiser's state are on disk. Raises NotFinite with step, learning rate and
    sample ids; the last epoch's files stay. `about` (method, classes, class_counts, …) goes into the summary.
    """
    if run.has("summary.json"):
        run.log(f"the run in {run.folder} is complete")
        return
    torch.backends.cudnn.deterministic = True  # its fastest convolutions add in another order each time
    training, model = task.training, task.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    classes = sum(count > 0 for count in about["class_counts"])
    run.log(
        f"{about['method']}: {parameters:,} parameters, {len(task.sample_id):,} samples of {classes} classes, "
        f"{runs.device_name(task.images.device)}"
    )
    optimiser = build_optimiser(model, training)
    best = {"epoch": None, "top1": -1.0}
    first = 0
    if run.has("state.safetensors"):
        first, best = _load_state(run, task.network, optimiser)
        run.log(f"resumed after epoch {first} of {training.epochs}")
    elif run.has("last.safetensors") and len(run.metrics()) > 1:  # one: it ended before its state was written
        raise UserError(f"{run.folder} has lost state.safetensors, which --resume needs; restore it, or name another folder")
    run.rewind_metrics(first)
    mode = "reduce-overhead" if training.compile == "cuda_graphs" else "default"
    forward = torch.compile(task.network, mode=mode) if training.compile else task.network
    with Progress(f"{run.label}training", training.epochs, first, "epochs") as progress:
        for epoch in range(first, training.epochs):
            try:
                record = {"epoch": epoch + 1, **(yield from run_epoch(task, forward, optimiser, epoch))}
            except NotFinite as error:
                raise NotFinite(f"{run.label}{error}") from None
            if (epoch + 1) % training.evaluate_every == 0 or epoch + 1 == training.epochs:
                start = time.perf_counter()
                scores = task.evaluate(model)
                record |= {"test": scores, "evaluation_seconds": time.perf_counter() - start}
                if scores["top1"] > best["top1"]:
                    best = {"epoch": epoch + 1, **scores}
                    run.save_tensors("best", model.state_dict(), epoch=epoch + 1)
            run.append_metrics(record)
            run.save_tensors("last", model.state_dict(), epoch=epoch + 1)
            _save_state(run, task.network, optimiser, epoch + 1, best)
            progress.advance(record["images_per_second"], "images/s")
            run.log(_line(record, training.epochs))
    records = run.metrics(training.epochs)
    run.write_summary(
        {
            **about,
            "seed": task.seed,
            "parameters": parameters,
            "last": {"epoch": training.epochs, **records[-1]["test"]},
            "best": best,
            "seconds": sum(record["seconds"] + record.get("evaluation_seconds", 0) for record in records),
            "data_share": float(np.mean([record["data_share"] for record in records])),
            "peak_memory": runs.peak_memory(task.images.device),
            "digest": runs.digest(model.state_dict()),
        }
    )


def build_optimiser(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """Stochastic gradient descent on every parameter that is not frozen."""
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=training.learning_rate,
        momentum=training.momentum,
        nesterov=training.nesterov,
        weight_decay=training.weight_decay,
        fused=training.fused,
    )


def run_epoch(
    task: Task, forward: Callable, optimiser: torch.optim.Optimizer, epoch: int
) -> Generator[None, None, dict[str, float]]:
    """One pass over the rows of `epoch`, with a pause after every step; returns what is recorded of it.

    The host waits for the device only every CHECK_EVERY steps.
    """
    training, device = task.training, task.images.device
    start, spent = time.perf_counter(), 0.0  # without the pauses
    # what a network draws itself (dropout, stochastic depth) follows from seed and epoch too
    torch.manual_seed(int(philox.draw(task.seed, philox.DROPOUT, epoch)[:2].astype(np.int64) @ [1 << 31, 1]))
    rows, views = _draw(task, epoch)
    task.prepare(views, views if epoch + 1 == training.epochs else _draw(task, epoch + 1)[1])
    steps = math.ceil(len(rows) / training.batch_size)
    sums: dict[str, torch.Tensor] = {}
    first_bad = torch.full((), steps, device=device)  # first step of the epoch whose loss was not finite
    task.network.train()
    waited = [0.0]
    for step, batch in enumerate(_timed(task.images.batches(rows, views, training.batch_size), waited)):
        rate = learning_rate(training, epoch * steps + step, steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bfloat16"):
            output = forward(batch.images)
        parts = task.loss(output, batch, epoch)
        loss = parts["loss"].mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            for name, values in parts.items():
                sums[name] = sums.get(name, 0) + values.sum()
            first_bad = torch.where(loss.isfinite() | (first_bad < step), first_bad, step)
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            _check(task, int(first_bad), rows, epoch, steps)
        spent += time.perf_counter() - start
        yield
        start = time.perf_counter()
    if not all(bool(parameter.isfinite().all()) for parameter in task.model.parameters()):
        _check(task, steps - 1, rows, epoch, steps)  # the last step's loss was finite, what it did was not
    seconds = spent + time.perf_counter() - start
    correct = float(sums.pop("correct"))
    return {
        **{name: float(value) / len(rows) for name, value in sums.items()},
        "train_top1": 100 * correct / len(rows),
        "learning_rate": rate,
        "seconds": seconds,
        "data_share": waited[0] / seconds,  # of the time, in which the host waited for batches or cropped them
        "images_per_second": len(rows) / seconds,
    }


def _timed(batches, waited: list[float]):
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
    """The rows that an epoch visits, in order, and the view of each."""
    rows = task.rows(epoch)
    return rows, task.views.draw(task.seed, epoch, task.sample_id[rows], samplers.occurrence(rows))


def _check(task: Task, bad: int, rows: np.ndarray, epoch: int, steps: int) -> None:
    if bad >= steps:
        return
    size = task.training.batch_size
    ids = task.sample_id[rows[bad * size : (bad + 1) * size]].tolist()
    rate = learning_rate(task.training, epoch * steps + bad, steps)
    kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "no epoch was finished"
    raise NotFinite(
        f"training diverged (not finite) at epoch {epoch + 1}, step {epoch * steps + bad}, learning rate {rate:.4g}; {kept}; "
        f"lower the learning rate, or look at samples {', '.join(map(str, ids))}"
    )


def _save_state(run: runs.Run, network, optimiser, epoch: int, best: dict) -> None:
    tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
    for name, parameter in network.named_parameters():
        if (momentum := optimiser.state[parameter].get("momentum_buffer")) is not None:
            tensors[f"momentum.{name}"] = momentum
    run.save_tensors("state", tensors, epoch=epoch, best=best)


def _load_state(run: runs.Run, network, optimiser) -> tuple[int, dict]:
    tensors, metadata = run.load_tensors("state")
    network.load_state_dict({name: tensors[f"network.{name}"] for name in network.state_dict()})
    for name, parameter in network.named_parameters():
        if (momentum := tensors.get(f"momentum.{name}")) is not None:
            momentum = torch.empty_like(parameter).copy_(momentum)  # in the parameter's memory format
            optimiser.state[parameter]["momentum_buffer"] = momentum
    return metadata["epoch"], metadata["best"]


def _line(record: dict, epochs: int) -> str:
    parts = [f"epoch {record['epoch']}/{epochs}", f"loss {record['loss']:.4f}", f"train {record['train_top1']:.1f}%"]
    if test := record.get("test"):
        groups = " ".join(f"{name} {test[name]:.1f}" for name in ("many", "medium", "few") if test[name] is not None)
        parts.append(f"test {test['top1']:.2f}% ({groups})")
    parts.append(f"{record['images_per_second']:.0f} images/s")
    return "  ".join(parts)
