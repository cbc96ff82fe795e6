"""The commands of offline-bkd. No logic lives here; torch is imported only by a command that needs it."""

import contextlib
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import click

if not __package__:  # `python cli.py`: the package is the checkout that this file lies in, whatever is installed
    ROOT = Path(__file__).resolve().parent
    SPEC = importlib.util.spec_from_file_location("offline_bkd", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["offline_bkd"] = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(sys.modules["offline_bkd"])

from offline_bkd.pipeline import UserError, __version__
from offline_bkd.pipeline.guard import PLACE, Commands, Number, guarded

on_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: a GPU where there is one, of several the first in CUDA_VISIBLE_DEVICES.",
)
of_checkpoint = click.option(
    "--checkpoint",
    type=click.Choice(["last", "best"]),
    default="last",
    show_default=True,
    help="The weights after the last epoch, or of the best one.",
)


def overriding(help: str):
    """The option of keys of a configuration that are to be others."""
    return click.option("-o", "overrides", multiple=True, metavar="KEY=VALUE", help=help)


def configured(command):
    """The options that say which experiment is meant, and where it runs."""

    @click.option(
        "--config", "config_file", required=True, type=PLACE, metavar="FILE", help="The experiment, a YAML file; see configs/."
    )
    @overriding("Override one key of it; repeatable.")
    @click.option(
        "--seed",
        type=int,
        help="Of initial weights, sample order and the views of an epoch, none of which a dump has; overrides the file's.",
    )
    @on_device
    @guarded
    @functools.wraps(command)
    def run(config_file, overrides, seed, device, **kwargs):
        from offline_bkd.pipeline.config import load_config
        from offline_bkd.pipeline.device import choose_device

        return command(load_config(config_file, overrides, seed), choose_device(device), **kwargs)

    return run


def experiment(command):
    """The same, of a command that can go on where it was interrupted, and say what it would do."""
    resume = click.option("--resume", is_flag=True, help="Go on with what an interrupted command left in --out.")
    dry_run = click.option(
        "--dry-run", is_flag=True, help="Print the resolved experiment, sizes and an estimate of time; write nothing."
    )
    return configured(resume(dry_run(command)))


def training(command):
    """The options of a command that trains a network, or one of each of several seeds."""

    @click.option("--backbone", type=PLACE, metavar="RUN", help="A complete run whose backbone is taken, for crt and oltr.")
    @click.option("--out", required=True, type=PLACE, metavar="RUN", help="Folder for the run, new or empty.")
    @click.option("--track", "tracker", type=click.Choice(["tensorboard", "wandb"]), help="Follow the run with a tracker.")
    @click.option("--seeds", metavar="0,1,2", help="A run of each, one after the other, in the folders OUT-0, OUT-1, OUT-2.")
    @experiment
    @functools.wraps(command)
    def run(config, device, seeds, dry_run, **kwargs):
        if seeds is not None and (dry_run or click.get_current_context().params["seed"] is not None):
            raise UserError("--seeds stands for several runs, --seed and --dry-run for one; leave out the one or the other")
        return command(config, device, seeds=parse_seeds(seeds), dry_run=dry_run, **kwargs)

    return run


def parse_seeds(text: str | None) -> tuple[int, ...]:
    """Of "0,1,2": each once."""
    try:
        seeds = () if text is None else tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        seeds = (-1,)
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"--seeds {text!r}: seeds are whole numbers with commas between, such as 0,1,2")
    return seeds


def parse_part(text: str | None) -> tuple[int, int] | None:
    """Of "3/64": (3, 64)."""
    match = None if text is None else re.fullmatch(r"([1-9]\d{0,6})/([1-9]\d{0,6})", text)
    if text is not None and not (match and int(match[1]) <= int(match[2])):
        raise UserError(f"--part {text!r}: a part is its number, from 1, and how many there are, such as 3/64")
    return match and (int(match[1]), int(match[2]))


def progress_aside(as_json: bool):
    """A context in which lines of progress go to the error output, where the other is read by a program."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="offline-bkd")
def main():
    """Train students of long-tailed data from a teacher's cached answers.

    \b
    python cli.py train-teacher --config configs/digits.yaml --out runs/teacher
    python cli.py dump-logits   --config configs/digits.yaml --teacher runs/teacher --out runs/cache.zarr
    python cli.py train-student --config configs/digits.yaml --cache runs/cache.zarr --out runs/student
    """


@main.command("train-teacher", short_help="Train the teacher (stage one, first half).")
@training
def train_teacher(config, device, backbone, out, tracker, seeds, resume, dry_run):
    """Example: python cli.py train-teacher --config configs/digits.yaml --out runs/teacher

    Stage one, first half: train the teacher on the long-tailed training set, by cross-entropy or another teacher.method.
    """
    from offline_bkd.pipeline import train
    from offline_bkd.pipeline.dry_run import show_training_plan

    if dry_run:
        return show_training_plan(config, device, "teacher", out, resume, None, backbone, tracker)
    train.train_teacher(config, out, device, backbone=backbone, seeds=seeds, tracker=tracker, resume=resume)


@main.command("import-model", short_help="Make a run of a network that was trained elsewhere.")
@click.option("--weights", required=True, type=PLACE, metavar="FILE", help="Its state dict: .safetensors, or from torch.save.")
@click.option("--out", required=True, type=PLACE, metavar="RUN", help="Folder for the run, new or empty.")
@click.option("--prefix", metavar="NAME", help="Which part of the file, if it holds the network twice: state_dict_ema.")
@click.option("--classes", type=PLACE, metavar="FILE", help="The order of its outputs: a class name of the data on each line.")
@click.option(
    "--expect", type=Number(0, 100), metavar="PERCENT", help="Its accuracy on the test set; refused if it is another."
)
@configured
def import_model(config, device, weights, out, prefix, classes, expect):
    """Example: python cli.py import-model --config birds.yaml --weights birds.ckpt --expect 71.3 --out runs/teacher

    Make a complete run of weights that were trained elsewhere, for the network in teacher.model; dump-logits takes it as a
    teacher. Files of timm, torchvision, Lightning and plain PyTorch are understood; nothing in them is run.
    """
    from offline_bkd.pipeline.import_model import import_model as import_weights

    import_weights(config, weights, out, device, prefix, classes, expect)


@main.command("dump-logits", short_help="Write the teacher's answers into a cache (stage one, second half).")
@click.option(
    "--teacher",
    "teachers",
    required=True,
    multiple=True,
    type=PLACE,
    metavar="RUN",
    help="A complete run, whoever trained it; several are averaged, experts (teacher.expert) share a cache.",
)
@click.option("--out", required=True, type=PLACE, metavar="STORE.zarr", help="The cache to write: a new or empty folder.")
@click.option("--apart", is_flag=True, help="Keep several teachers apart: a cache for each, in the folder --out.")
@click.option("--part", metavar="3/64", help="Only this part; the others are other processes', at once or in any order.")
@experiment
def dump_logits(config, device, teachers, out, apart, part, resume, dry_run):
    """Example: python cli.py dump-logits --config configs/digits.yaml --teacher runs/teacher --out runs/cache.zarr

    Stage one, second half: write the teacher's tempered probabilities for every view of every training sample.
    """
    from offline_bkd.pipeline import dump
    from offline_bkd.pipeline.dry_run import show_dump_plan

    if out.startswith("memory://"):
        raise UserError(f"{out}: nothing stays there when the command ends; name a folder, or an address on an object store")
    part = parse_part(part)
    if dry_run:
        return show_dump_plan(config, device, teachers, out, resume, apart, part)
    dump.dump_logits(config, teachers, out, device, apart=apart, part=part, resume=resume)


@main.command("train-student", short_help="Train a student from a cache (stage two).")
@click.option(
    "--cache", type=PLACE, metavar="STORE.zarr", help="A complete cache of this experiment, for methods that learn from one."
)
@training
def train_student(config, device, cache, backbone, out, tracker, seeds, resume, dry_run):
    """Example: python cli.py train-student --config configs/digits.yaml --cache runs/cache.zarr --out runs/student

    Stage two: train a student from a cache, without its teacher; or from a run's backbone (crt, oltr), or from labels alone.
    """
    from offline_bkd.pipeline import train
    from offline_bkd.pipeline.dry_run import show_training_plan

    if dry_run:
        return show_training_plan(config, device, "student", out, resume, cache, backbone, tracker)
    train.train_student(config, cache, out, device, backbone=backbone, seeds=seeds, tracker=tracker, resume=resume)


@main.command(short_help="Score a run's checkpoint again.")
@click.argument("run", type=PLACE)
@of_checkpoint
@overriding("Where the data set is (data.root=…), other test images (data.test=…), or a precision; repeatable.")
@on_device
@click.option("--out", type=PLACE, metavar="FOLDER", help="Where the files go; default: RUN/evaluation-CHECKPOINT.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON, with every class.")
@guarded
def evaluate(run, checkpoint, overrides, device, out, as_json):
    """Example: python cli.py evaluate runs/student

    Score a run's checkpoint on its test set again: top-1, top-5 and calibration by shot group, every class, confusions.
    """
    from offline_bkd.pipeline import runs
    from offline_bkd.pipeline.device import choose_device
    from offline_bkd.pipeline.evaluate import ask_run
    from offline_bkd.pipeline.show import evaluation, terminal

    if out:
        evaluation.make_folder(Path(out), runs.open_run(run), checkpoint)  # what cannot be one is refused before the work
    with progress_aside(as_json):
        answered = ask_run(run, checkpoint, overrides, choose_device(device))
        written = evaluation.keep_evaluation(answered, out)
        if not as_json:
            evaluation.print_evaluation(answered)
        terminal.line(written)
    if as_json:
        click.echo(json.dumps(answered.scores))


@main.command(short_help="Say what a network sees in images.")
@click.argument("run", type=PLACE)
@click.argument("images", type=PLACE, nargs=-1, required=True)
@click.option(
    "--out", type=PLACE, metavar="FILE", help="A .csv or .parquet file, which must not exist; without: CSV, printed."
)
@click.option("--probabilities", is_flag=True, help="Add a column for each class.")
@of_checkpoint
@on_device
@guarded
def predict(run, images, out, probabilities, checkpoint, device):
    """Example: python cli.py predict runs/student photos/ more.parquet --out answers.csv

    Write a table of image files, folders of them or Parquet files: file, class, confidence and the next best classes. What
    cannot be read is named and left out, and the command exits 1.
    """
    from offline_bkd.pipeline.device import choose_device
    from offline_bkd.pipeline.predict import predict as write_answers

    skipped = write_answers(run, images, out, checkpoint, choose_device(device), probabilities)
    return 1 if skipped else 0


@main.command("export-model", short_help="Write a network that runs without this package.")
@click.argument("run", type=PLACE)
@click.option("--format", "form", type=click.Choice(["onnx", "torch"]), default="onnx", show_default=True)
@click.option("--out", required=True, type=PLACE, metavar="FOLDER", help="A new or empty folder.")
@of_checkpoint
@overriding("Where its data set is (data.root=…), or other test images (data.test=…); repeatable.")
@guarded
def export_model(run, form, out, checkpoint, overrides):
    """Example: python cli.py export-model runs/student --out student-onnx

    Write a run's network as ONNX or as a program of torch.export: images in, logits out, checked on test images.
    """
    from offline_bkd.pipeline.export_model import export_model as write_network
    from offline_bkd.pipeline.show import terminal

    terminal.facts(write_network(run, form, out, checkpoint, overrides), out)


@main.command(short_help="Tell what a cache is.")
@click.argument("store", type=PLACE)
@click.option("--all", "everything", is_flag=True, help="Print everything that the cache says of itself.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@click.option("--parts", type=click.IntRange(1, 10**6), metavar="64", help="Print only which of so many parts are not dumped.")
@guarded
def inspect(store, everything, as_json, parts):
    """Example: python cli.py inspect runs/cache.zarr

    Tell what a cache is: whose answers to what, its size, whether it is complete, how good the teacher is. With --parts 64,
    which parts to give dump-logits again, as `sbatch --array` takes them: 3,17.
    """
    from offline_bkd.cache import open_cache
    from offline_bkd.pipeline.show import inspection, terminal

    if parts:
        if everything:
            raise UserError(
                "--parts prints numbers of parts alone, --all what the cache says of itself; leave out one of them"
            )
        left = [number for number, missing in enumerate(open_cache(store).parts(parts), 1) if missing]
        return click.echo(json.dumps(left) if as_json else ",".join(map(str, left)))
    summary = open_cache(store).summary()
    if as_json:
        click.echo(json.dumps(summary))
    elif everything:
        terminal.facts(summary, store)
    else:
        inspection.print_store(summary, store)


@main.command(short_help="Compare a cache with its teacher's answers.")
@click.argument("store", type=PLACE)
@click.option(
    "--teacher", "teachers", multiple=True, type=PLACE, metavar="RUN", help="The run, or runs, whose answers the cache holds."
)
@click.option("--views", type=click.IntRange(min=1), help="How many views to compute again; default: 2.")
@click.option(
    "--tolerance", type=Number(0, 1), help="Largest mean total variation of a block; default: what the encoding promises."
)
@click.option("--checksums", is_flag=True, help="Only check every stored byte; needs no teacher.")
@overriding("Where its training images are (data.root=…), or cache.precision; repeatable.")
@on_device
@click.option("--all", "everything", is_flag=True, help="Print all that was measured, of every class.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
@guarded
def verify(store, teachers, views, tolerance, checksums, overrides, device, everything, as_json):
    """Example: python cli.py verify runs/cache.zarr --teacher runs/teacher

    Compare a cache with its teacher's answers, computed again. Exits 1 if they are further apart than the tolerance.
    """
    from offline_bkd.cache import open_cache
    from offline_bkd.pipeline.show import inspection, terminal

    if checksums:
        if teachers or views or overrides or tolerance is not None:
            raise UserError(
                "--checksums computes no answers; leave out --teacher, --views, --tolerance and -o, or leave out --checksums"
            )
        report, show = open_cache(store).checksum_report(), inspection.print_checksums
    elif not teachers:
        raise UserError("verify computes answers again: name the teacher's run with --teacher, or use --checksums")
    else:
        from offline_bkd.pipeline.device import choose_device
        from offline_bkd.pipeline.verify import verify_cache

        with progress_aside(as_json):
            report = verify_cache(store, teachers, views or 2, tolerance, overrides, choose_device(device))
        show = inspection.print_comparison
    if as_json:
        click.echo(json.dumps(report))
    elif everything:
        terminal.facts(report, store)
        inspection.print_verdict(report)
    else:
        show(report, store)
    return 0 if report["passed"] else 1


@main.command(short_help="Write a cache as Parquet.")
@click.argument("store", type=PLACE)
@click.option("--out", required=True, type=PLACE, metavar="FILE.parquet", help="The file to write; must not exist.")
@click.option("--view", "views", multiple=True, type=int, help="Only this view; repeatable.")
@click.option("--label", "labels", multiple=True, help="Only samples of this class, by name; repeatable.")
@click.option("--probabilities", is_flag=True, help="Add a column for each class.")
@guarded
def export(store, out, views, labels, probabilities):
    """Example: python cli.py export runs/cache.zarr --out answers.parquet --view 3

    Write the cached predictions as Parquet, one row a sample and view, without holding the store in memory.
    """
    from offline_bkd.cache import open_cache
    from offline_bkd.pipeline.show import terminal

    if not out.endswith(".parquet"):
        raise UserError(f"--out {out}: the table is Parquet; name a file that ends in .parquet")
    rows = open_cache(store).export_parquet(
        out, view=list(views) or None, label=list(labels) or None, probabilities=probabilities
    )
    click.echo(f"{out}: {terminal.counted(rows, 'row')}")


@main.command(short_help="Compare runs: a table and pictures.")
@click.argument("run", type=PLACE, nargs=-1, required=True)
@click.option("--out", required=True, type=PLACE, metavar="FOLDER", help="Where the table and the figures go.")
@guarded
def report(run, out):
    """Example: python cli.py report runs/teacher runs/kd runs/bkd --out runs/report

    Compare complete runs: a table by many, medium and few-shot classes, curves, accuracy over class size, and a page of all.
    """
    from offline_bkd.pipeline.show import report, terminal

    answer, table = report.write_report(run, out)
    terminal.table(table, "test accuracy of the last epoch, %")
    terminal.line(f"pictures and the whole report: {Path(out) / 'report.html'}")
    terminal.sentence(answer)


@main.command(short_help="Run a published table's experiments and compare.")
@click.option("--table", required=True, metavar="NAME", help="A table of configs/tables, or a YAML file like those.")
@click.option(
    "--out",
    required=True,
    type=PLACE,
    metavar="FOLDER",
    help="Where runs, table and figure go; given again, it goes on there.",
)
@click.option("--quick", is_flag=True, help="The same at a small scale, for a CPU.")
@click.option("--row", "rows", multiple=True, help="Only this row; repeatable.")
@click.option("--column", "columns", multiple=True, help="Only this column; repeatable.")
@click.option("--seeds", metavar="0,1,2", help="Instead of the table's own.")
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at once; default: one a core, on GPUs at most four each.")
@on_device
@click.option("--dry-run", is_flag=True, help="Print the commands, and which are done; write nothing.")
@guarded
def reproduce(table, out, quick, rows, columns, seeds, jobs, device, dry_run):
    """Example: python cli.py reproduce --table cifar --quick --out runs/tables/cifar-quick

    Train every cell of a published table, or go on with what is there, and print ours beside the published numbers.
    """
    from offline_bkd.pipeline import reproduce
    from offline_bkd.pipeline.device import choose_device

    whole = reproduce.load_table(table)
    part, device = reproduce.select(whole, rows, columns, parse_seeds(seeds), quick), choose_device(device)
    if dry_run:
        return reproduce.show_plan(whole, part, out, device, quick)
    failed = reproduce.reproduce(whole, part, out, device, quick, jobs)
    return 1 if failed else 0


if __name__ == "__main__":
    main()
