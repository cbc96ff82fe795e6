"""What a distilled step costs: cached BKD against cross-entropy alone, and against training with a live teacher.

    python benchmarks/train.py --out results

ResNet-20 on CIFAR-100-LT, ResNet-32 on CIFAR-10-LT, and ResNet-50 on JPEG files that worker processes decode. All is
measured in one run, in turns; figures are medians and ratios of medians. CIFAR comes from $OFFLINE_BKD_DATA where that is
set; otherwise it is random pixels, which take as long. The files are made, of noise.
"""

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from offline_bkd.cache.views import CropFlip, RandomResizedCrop
from offline_bkd.pipeline import config, runs, schema
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import DecodedImages, ResidentImages
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.training import engine, losses
from offline_bkd.pipeline.training.methods import Setting, build_method

ROOT = Path(__file__).resolve().parent.parent

T, BATCH, VIEWS = 2.0, 128, CropFlip(pad=4, flip=True)


class SimulatedTargets:
    """What `pipeline.targets.Targets` gathers from, filled with random numbers: K planes of N rows."""

    def __init__(self, planes: int, samples: int, classes: int, width: int | None, device: torch.device):
        """`width`: codes a row of transform-coded targets; None for float16 probabilities."""
        generator = torch.Generator().manual_seed(0)
        if width is None:
            plane = torch.softmax(torch.randn(samples, classes, generator=generator), 1).half()
        else:
            plane = torch.randint(-300, 300, (samples, width), generator=generator, dtype=torch.int16)
        self.planes = plane.expand(planes, *plane.shape).contiguous().to(device)
        self.basis = width and (torch.randn(width, classes, generator=generator) * 0.002).to(device)
        self.mean, self.temperature = torch.zeros(classes, device=device), T

    def gather(self, rows, views):
        stored = self.planes[views % len(self.planes), rows].float()
        return stored if self.basis is None else torch.softmax(torch.addmm(self.mean, stored, self.basis), 1)


def load(name: str, root: str | None) -> tuple[datasets.Dataset, datasets.Dataset, schema.Experiment]:
    experiment = config.load_config(ROOT / "configs" / f"{name}-quick.yaml")
    if root:
        return *datasets.load(experiment.data), experiment
    classes, largest = (100, 500) if name == "cifar100-lt" else (10, 5000)
    label = np.repeat(np.arange(classes), datasets.long_tailed_counts(classes, largest, 100))
    pixels = np.random.default_rng(0).integers(0, 256, (len(label), 32, 32, 3), dtype=np.uint8)
    names = tuple(str(c) for c in range(classes))
    whole = datasets.Dataset(name="random", classes=names, sample_id=np.arange(len(label)), label=label, images=pixels)
    return whole, whole.take(np.arange(10_000)), experiment


def image_files(folder: Path, count: int) -> datasets.Dataset:
    """`count` JPEG files of 10 classes, 500 by 375 pixels like ImageNet's, in `folder`."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        for part in ("train", "test"):
            path = folder / part / str(number % 10) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return datasets.load(schema.ImageFolder(name="imagefolder", root=str(folder)))[0]


def ours(network, method, training, train, images, targets, steps):
    """A function that runs `steps` steps of the engine and returns seconds a step."""
    device = images.device
    rows = np.random.default_rng(0).permutation(len(train))[: steps * training.batch_size]
    data = schema.Digits(name="digits")
    model = build_model(network, len(train.classes), data, 0, channels_last=training.channels_last).to(device)
    task = engine.Task(
        model=model,
        network=model,
        images=images,
        sample_id=train.sample_id,
        views=images.views,
        rows=lambda epoch: rows,
        loss=loss_of(method, targets, train.class_counts, device),
        prepare=lambda views, later: None,
        evaluate=None,
        training=training,
        seed=0,
    )
    optimiser = engine.build_optimiser(task.model, task.training)
    return lambda: engine.finish(engine.run_epoch(task, task.model, optimiser, 0))["seconds"] / steps


def loss_of(method, targets, class_counts, device):
    setting = Setting(
        model=None,
        sample_id=None,
        label=None,
        class_counts=class_counts,
        targets=targets,
        epochs=1,
        seed=0,
        device=device,
    )
    return build_method(method, setting).loss


class Crops(torch.utils.data.Dataset):
    """Single images, cropped one by one in worker processes."""

    def __init__(self, dataset: datasets.Dataset, transform):
        self.images, self.label = [dataset.decode(row) for row in range(len(dataset))], dataset.label
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.transform(self.images[row]), int(self.label[row])


def live(experiment, train, test, device, steps):
    """The public training loop's way of working: two functions, of seconds a step and of seconds over the test set.

    A loader of single PIL crops, the teacher's forward pass in every step, `loss.item()` in every step, the teacher over
    the test set in every epoch, float32.
    """
    normalise = [transforms.ToTensor(), transforms.Normalize(experiment.data.mean, experiment.data.std)]
    crop = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *normalise])
    teacher, student = (
        build_model(experiment.student.model, 100, experiment.data, seed).network.to(device) for seed in (0, 1)
    )
    teacher.eval()
    optimiser = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    weights = losses.effective_number_weights(torch.as_tensor(train.class_counts), 0.9999).float().to(device)
    pinned = {"num_workers": 2, "pin_memory": device.type == "cuda"}
    chosen = torch.utils.data.Subset(
        Crops(train, crop), np.random.default_rng(0).permutation(len(train))[: steps * BATCH].tolist()
    )
    loader = torch.utils.data.DataLoader(chosen, BATCH, shuffle=True, **pinned)
    shown = torch.utils.data.DataLoader(Crops(test.take(np.arange(2000)), transforms.Compose(normalise)), 100, **pinned)

    def step_seconds():
        start, total = time.perf_counter(), 0.0
        for images, label in loader:
            images, label = images.to(device), label.to(device)
            with torch.no_grad():
                probability = torch.softmax(teacher(images) / T, 1)
            logits = student(images)
            kd = losses.distillation(logits, losses.balanced_probability(probability, weights), T)
            loss = (losses.cross_entropy(logits, label) + kd).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
        return (time.perf_counter() - start) / steps

    def test_seconds():
        start = time.perf_counter()
        with torch.no_grad():
            for images, label in shown:
                (teacher(images.to(device)).argmax(1).cpu() == label).sum().item()
        return (time.perf_counter() - start) * len(test) / len(shown.dataset)

    return step_seconds, test_seconds


def in_turns(work: dict, repeats: int) -> dict[str, float]:
    """Median seconds of each function, called in turns; the first turn warms up and does not count."""
    seconds = {name: [] for name in work}
    for turn in range(repeats + 1):
        for name, function in work.items():
            found = function()
            if turn:
                seconds[name].append(found)
    return {name: statistics.median(values) for name, values in seconds.items()}


def growth(experiment, device, repeats) -> list[dict]:
    """What a step of BKD does beside the network's work, over N and C with simulated planes: a batch's targets and its loss,
    forward and backward. Cross-entropy's loss grows with C too, and stands beside it.
    """

    def once(method, targets, classes):
        loss = loss_of(method, targets, np.full(classes, 100), device)
        logits = torch.randn(BATCH, classes, device=device, requires_grad=True)
        batch = engine.Batch(
            rows=torch.randint(targets.planes.shape[1], (BATCH,), device=device),
            views=torch.zeros(BATCH, dtype=torch.int64, device=device),
            label=torch.randint(classes, (BATCH,), device=device),
            images=None,
        )

        def seconds():
            start = time.perf_counter()
            for _ in range(20):
                loss(logits, batch, 0)["loss"].mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / 20

        return seconds

    work, entries = {}, {}
    for samples, classes, width in (
        (100_000, 10, None), (100_000, 10, 8),
        (10_000, 100, None), (100_000, 100, None), (1_000_000, 100, None), (100_000, 100, 40),
        (100_000, 1000, None), (100_000, 1000, 60), (20_000, 8142, None), (100_000, 8142, 60),
    ):  # fmt: skip
        targets = SimulatedTargets(1, samples, classes, width, device)
        name = f"N {samples:,}, C {classes:,}, {'klt, R ' + str(width) if width else 'probability'}"
        work[name] = once(experiment.student.method, targets, classes)
        work.setdefault(classes, once(schema.CE(name="ce"), targets, classes))
        entries[name] = classes, targets.planes[0, 0].nbytes
    medians = in_turns(work, repeats)
    return [
        {"targets": name, "bytes a sample": size, "ms": 1e3 * medians[name], "ms of cross-entropy": 1e3 * medians[classes]}
        for name, (classes, size) in entries.items()
    ]


@click.command()
@click.option("--out", default="results", show_default=True, help="Folder for train-<device>.json.")
@click.option("--steps", default=20, show_default=True, help="Steps a turn.")
@click.option("--repeats", default=5, show_default=True, help="Turns that count.")
def main(out, steps, repeats):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    root = os.environ.get("OFFLINE_BKD_DATA")
    train, test, experiment = load("cifar100-lt", root)
    images, network = ResidentImages(train, VIEWS, device), experiment.student.model
    coded = SimulatedTargets(162, len(train), 100, 40, device)
    probability = SimulatedTargets(162, len(train), 100, None, device)
    ce, bkd = schema.CE(name="ce"), experiment.student.method
    step, over_test = live(experiment, train, test, device, steps)
    work = {"live": step, "live teacher over the test set": over_test}
    for precision in ("float32", "bfloat16"):
        training = schema.Training(precision=precision, batch_size=BATCH)
        work[f"ce {precision}"] = ours(network, ce, training, train, images, probability, steps)
        work[f"bkd probability {precision}"] = ours(network, bkd, training, train, images, probability, steps)
        work[f"bkd klt {precision}"] = ours(network, bkd, training, train, images, coded, steps)
    switches = ("channels_last", "fused")
    for switch in switches:
        training = schema.Training(batch_size=BATCH, **{switch: False})
        work[f"ce float32, {switch} off"] = ours(network, ce, training, train, images, probability, steps)
    others = {}
    ten, _, _ = load("cifar10-lt", root)
    deeper = schema.CifarResNet(name="cifar_resnet", depth=32)
    others["ResNet-32, CIFAR-10-LT"] = deeper, ten, ResidentImages(ten, VIEWS, device), steps, BATCH
    with tempfile.TemporaryDirectory() as folder:
        few, batch = (steps, 256) if device.type == "cuda" else (4, 16)
        files = image_files(Path(folder), few * batch)
        decoded = DecodedImages(files, RandomResizedCrop(size=224, count=30), device, workers=os.cpu_count())
        large = schema.TorchvisionModel(name="torchvision", architecture="resnet50")
        others["ResNet-50, image files"] = large, files, decoded, few, batch
        for name, (model, some, source, count, size) in others.items():
            targets = SimulatedTargets(1, len(some), len(some.classes), None, device)
            training = schema.Training(batch_size=size)
            for label, method in ("ce", ce), ("bkd", bkd):
                work[f"{label}, {name}"] = ours(model, method, training, some, source, targets, count)
        medians = in_turns(work, repeats)
    steps_an_epoch = -(-len(train) // BATCH)
    live_epoch = steps_an_epoch * medians["live"] + medians["live teacher over the test set"]
    ratios = {f"bkd / ce, {name}": medians[f"bkd, {name}"] / medians[f"ce, {name}"] for name in others}
    for switch in switches:
        ratios[f"ce, {switch} off / on"] = medians[f"ce float32, {switch} off"] / medians["ce float32"]
    for precision in ("float32", "bfloat16"):
        for encoding in ("probability", "klt"):
            epoch = steps_an_epoch * medians[f"bkd {encoding} {precision}"]
            ratios[f"bkd {encoding} / ce, {precision}"] = epoch / (steps_an_epoch * medians[f"ce {precision}"])
            ratios[f"live / bkd {encoding}, {precision}"] = live_epoch / epoch
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    result = {
        "command": f"python benchmarks/train.py --steps {steps} --repeats {repeats}",
        "commit": commit,
        "device": runs.device_name(device),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "data": train.name,
        "network": experiment.student.model.model_dump(),
        "ms a step": {name: 1e3 * value for name, value in medians.items() if "test set" not in name},
        "live teacher over the test set, s": medians["live teacher over the test set"],
        "steps an epoch": steps_an_epoch,
        "ratios of epochs": ratios,
        "growth": growth(experiment, device, 5 * repeats),
    }
    path = Path(out) / f"train-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
