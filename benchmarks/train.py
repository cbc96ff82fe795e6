"""What a distilled step costs: cached BKD against cross-entropy alone, and against training with a live teacher.

    python benchmarks/train.py --store STORE.zarr --out results

ResNet-20 on CIFAR-100-LT in whole epochs with the student's evaluation after each; ResNet-32 on CIFAR-10-LT and ResNet-50
on JPEG files, which worker processes decode, in steps. All is measured in one run, in turns; figures are medians and ratios
of medians. CIFAR comes from $OFFLINE_BKD_DATA where that is set; otherwise it is random pixels, which take as long. The
files are made, of noise. STORE.zarr, a complete cache of configs/cifar100-lt-quick.yaml, adds a plain PyTorch loop over
CachedTargets.
"""

import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
from measuring import save
from PIL import Image
from torch.nn import functional
from torchvision import transforms

from offline_bkd.cache import open_cache
from offline_bkd.cache.views import CropFlip, RandomResizedCrop
from offline_bkd.pipeline import config, schema
from offline_bkd.pipeline.cached_targets import CachedTargets, bkd_loss
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import DecodedImages, ResidentImages
from offline_bkd.pipeline.device import choose_device, device_name
from offline_bkd.pipeline.evaluate import evaluate
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.training import engine, losses
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.training.optimisation import Optimisation
from offline_bkd.pipeline.training.targets import soften

ROOT = Path(__file__).resolve().parent.parent

T, BATCH, VIEWS = 2.0, 128, CropFlip(pad=4, flip=True)


class SimulatedTargets:
    """What `pipeline.training.targets.Targets` gathers from, filled with random numbers: K planes of N rows."""

    def __init__(self, planes: int, samples: int, classes: int, encoding: str, device: torch.device):
        """`encoding`: probability, logit, or klt with the codes a row, as in "klt 40"."""
        self.encoding, _, width = encoding.partition(" ")
        self.decoder, self.temperature, generator = None, T, torch.Generator().manual_seed(0)
        if self.encoding == "klt":
            plane = torch.randint(-300, 300, (samples, int(width)), generator=generator, dtype=torch.int16)
            basis = torch.randn(int(width), classes, generator=generator) * 0.002
            self.decoder = torch.zeros(classes, device=device), basis.to(device)
        else:
            plane = torch.log_softmax(torch.randn(samples, classes, generator=generator), 1)
            plane = (plane if self.encoding == "logit" else plane.exp()).half()
        self.planes = plane.expand(planes, *plane.shape).contiguous().to(device)

    def prepare(self, drawn, later):
        pass

    def probability(self, rows, views, temperature):
        return soften(self.planes[views % len(self.planes), rows].float(), self.encoding, self.decoder)


class LiveTeacher:
    """A teacher that answers in every step, to the crops that the student gets: what a cache saves, and nothing else."""

    def __init__(self, model: torch.nn.Module, precision: str):
        self.model, self.bfloat16, self.temperature = model.eval(), precision == "bfloat16", T

    def prepare(self, drawn, later):
        pass

    def probability(self, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bfloat16):
            return torch.softmax(self.model(images).float() / T, 1)


def load(name: str, root: str | None) -> tuple[datasets.Dataset, datasets.Dataset, schema.Experiment]:
    experiment = config.load_config(ROOT / "configs" / f"{name}-quick.yaml")
    if root:
        return *datasets.load(experiment.data)[:2], experiment
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


def ours(network, settings, training, train, images, targets, steps, test_images=None):
    """A function that runs `steps` steps of the engine, and evaluates on `test_images` if given; it returns the seconds."""
    device, chosen = images.device, np.random.default_rng(0).permutation(len(train))[: steps * training.batch_size]
    data = schema.Digits(name="digits")
    model = build_model(network, len(train.classes), data, 0, channels_last=training.channels_last).to(device)
    method = method_of(settings, model, targets, train.class_counts, device)
    method.rows = lambda epoch: chosen
    if isinstance(targets, LiveTeacher):
        method.target = lambda batch, epoch: losses.balanced_probability(targets.probability(batch.images), method.weights)
    task = engine.Task(
        model=model,
        network=model,
        method=method,
        images=images,
        sample_id=train.sample_id,
        views=images.views,
        targets=targets,
        evaluate=None,
        validate=None,
        training=training,
        seed=0,
    )
    optimisation = Optimisation(model, model, training)

    def epoch() -> float:
        start = time.perf_counter()
        engine.train_epoch(task, model, optimisation, 0)
        if test_images:
            evaluate(model, test_images, train.class_counts, training.precision)
        return time.perf_counter() - start

    return epoch


def method_of(settings, model, targets, class_counts, device):
    context = Context(
        model=model,
        sample_id=None,
        label=None,
        class_counts=class_counts,
        targets=targets,
        epochs=1,
        seed=0,
        device=device,
    )
    return build_method(settings, context)


class Crops(torch.utils.data.Dataset):
    """Single images, cropped one by one in worker processes."""

    def __init__(self, dataset: datasets.Dataset, transform):
        self.images, self.label = [dataset.decode(row) for row in range(len(dataset))], dataset.label
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, row):
        return self.transform(self.images[row]), int(self.label[row])


def live(experiment, train, test, device):
    """The public way of working, in float32: a function that trains and evaluates for an epoch, and returns the seconds.

    A loader of single PIL crops with persistent workers, the teacher's forward pass in every step, accuracies and
    `loss.item()` in every step; the student over the test set.
    """
    normalise = [transforms.ToTensor(), transforms.Normalize(experiment.data.mean, experiment.data.std)]
    crop = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *normalise])
    teacher, student = (
        build_model(experiment.student.model, 100, experiment.data, seed).network.to(device) for seed in (0, 1)
    )
    teacher.eval()
    optimiser = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    weights = losses.effective_number_weights(torch.as_tensor(train.class_counts), 0.9999).float().to(device)
    pinned = {"num_workers": 2, "pin_memory": device.type == "cuda", "persistent_workers": True}
    loader = torch.utils.data.DataLoader(Crops(train, crop), BATCH, shuffle=True, **pinned)
    shown = torch.utils.data.DataLoader(Crops(test, transforms.Compose(normalise)), 100, **pinned)

    def epoch() -> float:
        start, total, right = time.perf_counter(), 0.0, 0
        student.train()
        for images, label in loader:
            images, label = images.to(device), label.to(device)
            with torch.no_grad():
                target = functional.softmax(teacher(images) / T, dim=1) * weights
                target = target / target.sum(1, keepdim=True)
            logits = student(images)
            kd = functional.kl_div(functional.log_softmax(logits / T, dim=1), target, reduction="batchmean") * T * T
            loss = functional.cross_entropy(logits, label) + kd
            total += loss.item()
            right += (logits.topk(5)[1] == label[:, None]).sum().item()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        student.eval()
        with torch.no_grad():
            for images, label in shown:
                right += (student(images.to(device)).argmax(1) == label.to(device)).sum().item()
        return time.perf_counter() - start

    return epoch


def plain_loop(store, network, data, train, test_images, device):
    """The loop of examples/plain_loop.py over `store`, in float32: a function that trains and evaluates for an epoch, and
    returns the seconds. Persistent workers; network and evaluation are the engine's, the optimiser is torch's fused one.
    """
    cache = open_cache(store)
    cached = CachedTargets(cache, [(train.decode(row), int(train.label[row])) for row in range(len(train))])
    loader = torch.utils.data.DataLoader(
        cached, BATCH, shuffle=True, num_workers=2, persistent_workers=True, pin_memory=device.type == "cuda"
    )
    model = build_model(network, len(train.classes), data, 0).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=2e-4, fused=True)
    turns = itertools.count()

    def epoch() -> float:
        start = time.perf_counter()
        model.train()
        cached.set_epoch(next(turns))
        for batch in loader:
            logits = model(batch.image.to(device).contiguous(memory_format=torch.channels_last))
            loss = bkd_loss(logits, batch.target.to(device), batch.label.to(device), cache.class_counts, temperature=T)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        evaluate(model, test_images, train.class_counts, "float32")
        return time.perf_counter() - start

    return epoch


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

    def once(settings, targets, classes):
        method = method_of(settings, None, targets, np.full(classes, 100), device)
        logits = torch.randn(BATCH, classes, device=device, requires_grad=True)
        batch = engine.Batch(
            rows=torch.zeros(BATCH, dtype=torch.int64, device=device),
            views=torch.zeros(BATCH, dtype=torch.int64, device=device),
            label=torch.randint(classes, (BATCH,), device=device),
            images=None,
        )

        def seconds():
            drawn = torch.randint(targets.planes.shape[1], (20, BATCH), device=device)  # rows that the CPU has not at hand
            start = time.perf_counter()
            for rows in drawn:
                method.loss(logits, batch._replace(rows=rows), 0).mean().backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / 20

        return seconds

    work, entries = {}, {}
    for samples, classes, encoding in (
        (100_000, 10, "probability"), (100_000, 10, "logit"), (100_000, 10, "klt 8"),
        (10_000, 100, "probability"), (100_000, 100, "probability"), (1_000_000, 100, "probability"),
        (100_000, 100, "logit"), (100_000, 100, "klt 40"),
        (100_000, 1000, "probability"), (100_000, 1000, "logit"), (100_000, 1000, "klt 60"),
        (20_000, 8142, "probability"), (20_000, 8142, "logit"), (100_000, 8142, "klt 60"),
    ):  # fmt: skip
        targets = SimulatedTargets(1, samples, classes, encoding, device)
        name = f"N {samples:,}, C {classes:,}, {encoding}"
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
@click.option("--store", help="A complete cache of configs/cifar100-lt-quick.yaml, for a loop over CachedTargets.")
@click.option("--epochs", default=5, show_default=True, help="Turns of whole epochs that count.")
@click.option("--steps", default=20, show_default=True, help="Steps a turn, of the other networks.")
def main(out, store, epochs, steps):
    device = choose_device("auto")  # as the commands do; what it sets, the other ways have too
    root = os.environ.get("OFFLINE_BKD_DATA")
    train, test, experiment = load("cifar100-lt", root)
    ce, bkd, network = schema.CE(name="ce"), experiment.student.method, experiment.student.model
    images, test_images = (ResidentImages(part, VIEWS, device) for part in (train, test))
    encodings = {"probability": "probability", "logit": "logit", "klt": "klt 40"}
    targets = {name: SimulatedTargets(162, len(train), 100, encoding, device) for name, encoding in encodings.items()}
    whole, every = {"live float32": live(experiment, train, test, device)}, -(-len(train) // BATCH)
    for precision in ("float32", "bfloat16"):
        training = schema.Training(precision=precision, batch_size=BATCH)
        teacher = LiveTeacher(build_model(network, 100, experiment.data, 1).to(device), precision)
        cached = ((f"bkd {name}", bkd, source) for name, source in targets.items())
        for name, settings, source in ("ce", ce, None), *cached, ("live, our engine", bkd, teacher):
            whole[f"{name} {precision}"] = ours(network, settings, training, train, images, source, every, test_images)
    if store:
        whole["CachedTargets float32"] = plain_loop(store, network, experiment.data, train, test_images, device)
    medians = in_turns(whole, epochs)
    ratios = {}
    for precision in ("float32", "bfloat16"):
        for name in ("live", "live, our engine", "CachedTargets"):
            if (other := f"{name} {precision}") in medians:
                ratios[f"{name} / bkd probability, {precision}"] = medians[other] / medians[f"bkd probability {precision}"]
        for encoding in targets:
            ratios[f"bkd {encoding} / ce, {precision}"] = medians[f"bkd {encoding} {precision}"] / medians[f"ce {precision}"]
    single, more = steps_of_others(experiment, train, images, targets["probability"], root, device, steps, epochs)
    figures = {
        "data": train.name,
        "network": network.model_dump(),
        "s an epoch with evaluation": medians,
        "ms a step": single,
        "ratios": ratios | more,
        "growth": growth(experiment, device, 5 * epochs),
    }
    save(Path(out) / f"train-{device.type}.json", figures, "torch", "torchvision", device=device_name(device))


def steps_of_others(experiment, train, images, targets, root, device, steps, repeats) -> tuple[dict, dict]:
    """Milliseconds a step of other networks and with a switch off, and their ratios."""
    ce, bkd, work, many = schema.CE(name="ce"), experiment.student.method, {}, {}
    for switch in ("", "channels_last", "fused"):
        training = schema.Training(batch_size=BATCH, **({switch: False} if switch else {}))
        name = f"ce float32, {switch} off" if switch else "ce float32"
        work[name] = ours(experiment.student.model, ce, training, train, images, targets, steps)
        many[name] = steps
    ten, _, _ = load("cifar10-lt", root)
    deeper = schema.CifarResNet(name="cifar_resnet", depth=32)
    others = {"ResNet-32, CIFAR-10-LT": (deeper, ten, ResidentImages(ten, VIEWS, device), steps, BATCH)}
    with tempfile.TemporaryDirectory() as folder:
        few, batch = (steps, 256) if device.type == "cuda" else (4, 16)
        files = image_files(Path(folder), few * batch)
        decoded = DecodedImages(files, RandomResizedCrop(size=224, count=30), device, workers=os.cpu_count())
        large = schema.TorchvisionModel(name="torchvision", architecture="resnet50")
        others["ResNet-50, image files"] = large, files, decoded, few, batch
        for name, (model, some, source, count, size) in others.items():
            random = SimulatedTargets(1, len(some), len(some.classes), "probability", device)
            training = schema.Training(batch_size=size)
            for label, settings in ("ce", ce), ("bkd", bkd):
                work[f"{label}, {name}"] = ours(model, settings, training, some, source, random, count)
                many[f"{label}, {name}"] = count
        medians = in_turns(work, repeats)
    ratios = {f"bkd / ce, {name}": medians[f"bkd, {name}"] / medians[f"ce, {name}"] for name in others}
    for switch in ("channels_last", "fused"):
        ratios[f"ce, {switch} off / on"] = medians[f"ce float32, {switch} off"] / medians["ce float32"]
    return {name: 1e3 * seconds / many[name] for name, seconds in medians.items()}, ratios


if __name__ == "__main__":
    main()
