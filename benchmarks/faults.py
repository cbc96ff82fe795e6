"""What becomes of stores under flipped bits, kills and failing disks; counts, which should say that nothing was missed.

    python benchmarks/faults.py --flips 600 --kills 100 --failures 200 --training-kills 100 --out results

Flips: one random bit of a store of each encoding, of any file as likely as of any other, is found on opening it or by its
checksums, or missed. Kills: dumps of the digits, in processes of their own, are killed (SIGKILL) at random moments and
resumed until they end; the bytes are those of a dump that nothing disturbed, or not. Failures: an operation of the disk
fails, at random; the dump stops with that error, and is resumed to the same bytes, or not. Training kills: students that
learn from the float32 store are killed and resumed likewise; they end as one that nothing disturbed, in every weight and every
recorded figure but times, or not.
"""

import errno
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import click
import torch
from measuring import save

from offline_bkd.cache import CacheError, open_cache, storage
from offline_bkd.pipeline import config, dump, runs, train
from offline_bkd.pipeline.schema import Experiment

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "teacher.model={name: cifar_resnet, depth: 8, width: 4}",
    "teacher.training.epochs=1",
    "student.model={name: cifar_resnet, depth: 8, width: 4}",
    "student.training.epochs=6",
    "views={name: crop_flip, pad: 2, flip: true}",
)
ENCODINGS = {
    "logit": "{name: logit}",
    "float32": "{name: probability, dtype: float32}",
    "klt": "{name: klt, max_error: 0.02}",
}


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a store but its lock, by key."""
    keys = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {key: path.read_bytes() for key, path in keys.items() if key != "done/lock"}


def experiment(encoding: str = "logit") -> Experiment:
    overrides = *SMALL, f"cache.encoding={ENCODINGS[encoding]}", "cache.features=true"
    return config.load_config(ROOT / "configs/digits.yaml", overrides, 0)


def dumped(teacher: Path, store: Path, asked: Experiment) -> Path:
    """The store of `teacher`, finished as it is asked for; what is printed is not shown."""
    with silent():
        dump.dump_logits(asked, [str(teacher)], str(store), torch.device("cpu"), resume=True)
    return store


@contextmanager
def silent() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def flips(store: Path, count: int) -> dict[str, int]:
    counts = {"on opening": 0, "by checksums": 0, "missed": 0}
    keys, chance = sorted(files(store)), random.Random(0)
    for _ in range(count):
        path = store / chance.choice(keys)
        whole = path.read_bytes()
        data, at = bytearray(whole), chance.randrange(len(whole))
        data[at] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            cache = open_cache(store)
            counts["by checksums" if cache.verify_checksums() or not cache.complete else "missed"] += 1
        except CacheError:
            counts["on opening"] += 1
        path.write_bytes(whole)
    return counts


def killed_until_ended(work: Callable, left: int, seconds: float, chance: random.Random) -> int:
    """Does `work` in processes that are killed at random moments, at most `left` of them; the next goes on until one ends.

    Returns how many were killed. `seconds`: what the work takes, about.
    """
    killed, ended = 0, False
    while not ended:
        child = os.fork()
        if not child:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        deadline = time.monotonic() + (chance.uniform(0, seconds) if killed < left else 1000 * seconds)
        while not ended and time.monotonic() < deadline:
            time.sleep(0.002)
            ended = os.waitpid(child, os.WNOHANG)[0] == child
        if not ended:
            os.kill(child, signal.SIGKILL)
            ended = not os.WIFSIGNALED(os.waitpid(child, 0)[1])  # in the last moment, before the signal came
            killed += not ended
    return killed


def kills(
    teacher: Path, whole: dict[str, bytes], folder: Path, asked: Experiment, count: int, seconds: float
) -> dict[str, int]:
    """`seconds`: what a dump takes, about."""
    counts, chance = {"kills": 0, "dumps": 0, "same bytes": 0, "left files": 0}, random.Random(0)
    while counts["kills"] < count:
        store = folder / f"killed-{counts['dumps']}"
        work = partial(dumped, teacher, store, asked)
        counts["kills"] += killed_until_ended(work, count - counts["kills"], seconds, chance)
        counts["dumps"] += 1
        left = files(store)
        counts["same bytes"] += left == whole
        counts["left files"] += len(left.keys() - whole.keys())
        shutil.rmtree(store)
    return counts


def trained(store: Path, out: Path, asked: Experiment) -> Path:
    """A student's complete run; what is printed is not shown."""
    with silent():
        train.train_student(asked, str(store), str(out), torch.device("cpu"), resume=True)
    return out


def learnt(folder: Path) -> tuple:
    """All that a run has come to, but for how long it took."""
    run = runs.open_run(folder)
    times = {"seconds", "evaluation_seconds", "data_share", "images_per_second", "peak_memory"}
    figures = [
        {name: value for name, value in record.items() if name not in times} for record in (*run.metrics(), run.summary())
    ]
    tensors = (run.load_tensors(name) for name in ("last", "best"))  # digests, as a header's order is by chance
    return figures, [(runs.digest(values), about) for values, about in tensors]


def training_kills(store: Path, folder: Path, asked: Experiment, count: int) -> dict[str, int]:
    start = time.perf_counter()
    whole, names = trained(store, folder / "undisturbed", asked), {path.name for path in (folder / "undisturbed").iterdir()}
    seconds, chance = time.perf_counter() - start, random.Random(0)
    counts = {"kills": 0, "runs": 0, "same": 0, "left files": 0}
    while counts["kills"] < count:
        out = folder / f"trained-{counts['runs']}"
        work = partial(trained, store, out, asked)
        counts["kills"] += killed_until_ended(work, count - counts["kills"], seconds, chance)
        counts["runs"] += 1
        counts["same"] += learnt(out) == learnt(whole)
        counts["left files"] += len({path.name for path in out.iterdir()} - names)
        shutil.rmtree(out)
    return counts


def failing(operation: Callable, left: list[int], code: int) -> Callable:
    """`operation`, which fails by the error `code` when all of those that share `left` have run so many times."""

    def operate(*given, **named):
        left[0] -= 1
        if not left[0]:
            raise OSError(code, os.strerror(code))
        return operation(*given, **named)

    return operate


def failures(teacher: Path, whole: dict, folder: Path, asked: Experiment, count: int) -> dict[str, int]:
    counts, chance = {"failures": 0, "one line": 0, "same bytes": 0}, random.Random(0)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "mkdir", "link")}
    while counts["failures"] < count:
        store, left = folder / f"failed-{counts['failures']}", [chance.randrange(1, 600)]
        code = chance.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
        for name, operation in real.items():
            setattr(storage.os, name, failing(operation, left, code))
        try:
            dumped(teacher, store, asked)
        except (OSError, CacheError) as error:
            counts["failures"] += 1
            counts["one line"] += "\n" not in str(error) and os.strerror(code) in str(error)
        finally:
            for name, operation in real.items():
                setattr(storage.os, name, operation)
        if left[0] <= 0:
            counts["same bytes"] += files(dumped(teacher, store, asked)) == whole
        shutil.rmtree(store, ignore_errors=True)
    return counts


@click.command()
@click.option("--flips", "flip_count", default=600, show_default=True, help="Of each encoding.")
@click.option("--kills", "kill_count", default=100, show_default=True, help="Of each encoding.")
@click.option("--failures", "failure_count", default=200, show_default=True, help="Of each encoding.")
@click.option("--training-kills", "training_kill_count", default=100, show_default=True)
@click.option("--encoding", "encodings", multiple=True, type=click.Choice([*ENCODINGS]), help="Only this; repeatable.")
@click.option("--out", help="Folder for faults.json.")
@click.option("--scratch", help="A folder to write the stores in.")
def main(flip_count, kill_count, failure_count, training_kill_count, encodings, out, scratch):
    torch.set_num_threads(1)  # whose processes may be forked
    table, trainings = {}, {}
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        train.train_teacher(experiment(), str(folder / "teacher"), torch.device("cpu"))
        for encoding in encodings or ENCODINGS:
            start, asked = time.perf_counter(), experiment(encoding)
            store = dumped(folder / "teacher", folder / encoding, asked)
            seconds, whole = time.perf_counter() - start, files(store)
            table[encoding] = {
                "files": len(whole),
                "flips": flips(store, flip_count),
                "kills": kills(folder / "teacher", whole, folder, asked, kill_count, seconds),
                "failures": failures(folder / "teacher", whole, folder, asked, failure_count),
            }
            click.echo(f"{encoding}: {json.dumps(table[encoding])}")
        if training_kill_count:
            asked = experiment("float32")
            store = dumped(folder / "teacher", folder / "float32", asked)
            trainings = training_kills(store, folder, asked, training_kill_count)
            click.echo(f"training: {json.dumps(trainings)}")
    if out:
        save(Path(out) / "faults.json", {"stores": table, "training": trainings}, "torch", "zarr", device="cpu (1 thread)")


if __name__ == "__main__":
    main()
