"""The walk from images to a student, and that cached training is training with a live teacher."""

import errno
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from cache_store import files
from made_runs import PART, make_run
from PIL import Image

from offline_bkd.cache import CacheError, open_cache
from offline_bkd.pipeline import UserError, requirements, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.dry_run import show_dump_plan
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.models import build_model
from offline_bkd.pipeline.requirements import open_matching_cache
from offline_bkd.pipeline.teachers import load_teacher
from offline_bkd.pipeline.train import train_student, train_teacher
from offline_bkd.pipeline.training.methods import Context, build_method
from offline_bkd.pipeline.training.ranks import batch_sizes
from offline_bkd.pipeline.training.samplers import instance_balanced
from offline_bkd.pipeline.training.targets import Targets
from offline_bkd.pipeline.verify import verify_cache

STEPS = 56


def losses_of(config, gather, beside=None) -> np.ndarray:
    """The first losses of a student that learns from `gather(rows, views)`.

    With `beside`, another `gather`, [STEPS, 2]: the losses to its targets, of the same weights, are the second column.
    """
    train, _, _ = datasets.load(config.data)
    images = open_images(train, config.views, tiny.CPU, 0)
    model = build_model(config.student.model, 10, config.data, config.seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss, other = (loss_of(config, model, train, targets) for targets in (gather, beside or gather))
    found, epoch = [], 0
    while len(found) < STEPS:
        rows = instance_balanced(config.seed, epoch, train.sample_id)
        for batch in images.batches(rows, config.views.draw(config.seed, epoch, train.sample_id[rows]), 64):
            logits = model(batch.images)
            value = loss(logits, batch, epoch).loss.mean()
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            found.append([value.item(), other(logits, batch, epoch).loss.mean().item()])
        epoch += 1
    found = np.array(found[:STEPS])
    return found if beside else found[:, 0]


def loss_of(config, model, train, gather):
    setting = Context(
        model=model,
        sample_id=train.sample_id,
        label=train.label,
        class_counts=train.class_counts,
        targets=SimpleNamespace(probability=gather, temperature=2.0),
        epochs=config.student.training.epochs,
        seed=config.seed,
        device=tiny.CPU,
    )
    return build_method(config.student.method, setting).loss


def live_teacher(config, teacher_run):
    """Asks the teacher itself for the same crop that the student sees: what the cache replaces."""
    train, _, _ = datasets.load(config.data)
    teacher, _ = load_teacher(str(teacher_run), train)
    images = open_images(train, config.views, tiny.CPU, 0)

    def gather(rows, views, temperature=2.0):
        with torch.no_grad():
            return torch.softmax(teacher(images.crop(rows, views)) / temperature, dim=1)

    return gather


def cached(path):
    return Targets(open_cache(path), tiny.CPU).probability


@pytest.mark.parametrize("method", ["{name: kd}", "{name: bkd}", "{name: bkd, reweight_from: 0.5}"])
def test_cached_training_is_training_with_a_live_teacher(method, teacher_run, cache):
    config = tiny.experiment(f"student.method={method}")
    online = losses_of(config, live_teacher(config, teacher_run))
    np.testing.assert_array_equal(losses_of(config, cached(cache)), online)
    assert online[-8:].mean() < online[:8].mean(), "and it learns"


def test_half_precision_targets_change_losses_by_no_more_than_their_rounding(tmp_path, teacher_run):
    config = tiny.experiment()
    dump_logits(config, [str(teacher_run)], str(tmp_path / "half.zarr"), tiny.CPU)
    exact, rounded = losses_of(config, live_teacher(config, teacher_run), cached(tmp_path / "half.zarr")).T
    error = np.abs(exact - rounded)
    assert 0 < error.max() < 2 * 2**-11 * exact.max(), "eleven bits of each probability"


def test_transform_coded_targets_train_as_closely_as_their_error_says(tmp_path, teacher_run):
    config = tiny.experiment("cache.encoding={name: klt, max_error: 0.005}")
    path = tmp_path / "klt.zarr"
    dump_logits(config, [str(teacher_run)], str(path), tiny.CPU)
    store = open_cache(path)
    rows, views = torch.arange(464), torch.full((464,), 4)
    np.testing.assert_allclose(cached(path)(rows, views), store.plane(4), atol=1e-5)
    exact, coded = losses_of(config, live_teacher(config, teacher_run), cached(path)).T
    assert 0 < np.abs(exact - coded).max() < 0.02 * exact.max()
    report = verify_cache(str(path), [str(teacher_run)], 2, None, (), tiny.CPU)
    assert report["passed"] and 0 < report["mean"] <= 0.005 + 1e-4
    train, _, _ = datasets.load(config.data)
    weight, distance = 1 / (1 - 0.9999 ** train.class_counts.astype(np.float64)), 0
    for view in report["views"]:
        answers = live_teacher(config, teacher_run)(rows, torch.full((464,), view)), store.plane(view)
        fresh, kept = (np.asarray(part, np.float64) * weight for part in answers)
        fresh, kept = (part / part.sum(1, keepdims=True) for part in (fresh, kept))
        distance = distance + np.abs(fresh - kept).sum(1) / 2 / len(report["views"])
    by_class = [distance[train.label == index].mean() for index in range(10)]
    np.testing.assert_allclose([*report["classes"].values()], by_class, rtol=1e-3)
    counts = train.class_counts
    groups = {"many": counts > 100, "medium": (counts >= 20) & (counts <= 100), "few": counts < 20}
    of_groups = {group: np.mean(np.array(by_class)[members]) for group, members in groups.items() if members.any()}
    assert len(of_groups) > 1 and report["shots"] == pytest.approx(of_groups, rel=1e-3)
    assert verify_cache(str(path), [str(teacher_run)], 1, None, ("cache.precision=bfloat16",), tiny.CPU)["passed"]
    with pytest.raises(UserError, match="is verified as it was dumped, but cache.temperature was 2.0 and is now 3.0; -o may"):
        verify_cache(str(path), [str(teacher_run)], 2, None, ("cache.temperature=3",), tiny.CPU)
    with pytest.raises(UserError, match="is verified as it was dumped, but data.std.* is now .*; -o may say where"):
        verify_cache(str(path), [str(teacher_run)], 2, None, ("data.std=[1, 1, 1]",), tiny.CPU)


def test_a_dump_is_in_the_precision_that_it_is_asked_for(tmp_path, teacher_run, cache):
    config = tiny.experiment(tiny.EXACT, "cache.precision=bfloat16")
    dump_logits(config, [str(teacher_run)], str(tmp_path / "rounded.zarr"), tiny.CPU)
    exact, rounded = open_cache(cache).plane(0), open_cache(tmp_path / "rounded.zarr").plane(0)
    assert 1e-4 < np.abs(exact - rounded).max() < 0.05


def test_a_dump_is_what_its_teacher_answers_on_either_device(tmp_path, teacher_run, device):
    for name in "first", "again":
        dump_logits(tiny.experiment(tiny.EXACT), [str(teacher_run)], str(tmp_path / name), device)
    assert files(tmp_path / "first") == files(tmp_path / "again"), "the same bits"
    for where in {device, tiny.CPU}:
        report = verify_cache(str(tmp_path / "first"), [str(teacher_run)], 2, None, (), where)
        assert report["passed"] and report["mean"] < 1e-3


def test_what_may_not_be_meant_is_noted(tmp_path, teacher_run, capsys):
    run = tmp_path / "run"
    schedule = "teacher.training.schedule={name: step, warmup_epochs: 1, milestones: [1, 2, 180]}"
    train_teacher(tiny.experiment(schedule), str(run), tiny.CPU)
    assert "note: training.schedule.milestones 2, 180 do not come in 2 epochs" in (run / "log.txt").read_text()
    assert "note" not in (teacher_run / "log.txt").read_text()
    capsys.readouterr()
    dump_logits(tiny.experiment("data.imbalance_ratio=5"), [str(teacher_run)], str(tmp_path / "other.zarr"), tiny.CPU)
    assert "was trained on other images (464 samples of 10 classes) than it is asked about (" in capsys.readouterr().out
    for changed in "teacher.model.depth", "teacher.training.epochs":
        dump_logits(tiny.experiment(f"{changed}=14"), [str(teacher_run)], str(tmp_path / f"{changed}.zarr"), tiny.CPU)
        (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert re.search(rf"teacher answers as it was trained, though {changed} was \d and is now 14$", note)
    dump_logits(tiny.experiment(), [str(teacher_run)], str(tmp_path / "same.zarr"), tiny.CPU)
    assert "note" not in capsys.readouterr().out


def test_the_student_needs_no_teacher(tmp_path, teacher_run, cache):
    config = tiny.experiment()
    shutil.copytree(teacher_run, tmp_path / "teacher")
    dump_logits(
        tiny.experiment(tiny.EXACT),
        [str(tmp_path / "teacher")],
        str(tmp_path / "c.zarr"),
        tiny.CPU,
    )
    train_student(config, str(tmp_path / "c.zarr"), str(tmp_path / "before"), tiny.CPU)
    shutil.rmtree(tmp_path / "teacher")
    train_student(config, str(tmp_path / "c.zarr"), str(tmp_path / "after"), tiny.CPU)
    before, after = (runs.open_run(tmp_path / name).summary() for name in ("before", "after"))
    assert before["digest"] == after["digest"] and before["last"] == after["last"]
    assert before["teacher"]["test"] == runs.open_run(teacher_run).summary()["last"], "its accuracy came along in the cache"


def test_methods_that_distil_nothing_need_no_cache_and_the_others_do(tmp_path):
    for method in ("ce", "cb", "focal", "cb_focal", "logit_adjustment", "ldam"):
        config = tiny.experiment(f"student.method={{name: {method}}}", "student.model.cosine_scale=30")
        train_student(config, None, str(tmp_path / method), tiny.CPU)
        assert runs.open_run(tmp_path / method).summary()["method"] == method
    with pytest.raises(UserError, match="method bkd learns from a cache; name one with --cache"):
        train_student(tiny.experiment(), None, str(tmp_path / "bkd"), tiny.CPU)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("data.seed=1", r"dataset\.samples: the store has .*, the run has"),
        ("data.imbalance_ratio=10", r"dataset\.labels"),
        ("views.pad=2", r"views\.pad: the store has 1, the run has 2"),
        ("views.flip=true", r"views\.flip: the store has False, the run has True"),
        ("cache.temperature=4", r"temperature: the store has 2\.0, the run has 4\.0"),
    ],
)
def test_a_cache_for_something_else_is_refused_before_anything_is_written(override, difference, tmp_path, cache):
    with pytest.raises(CacheError, match=f"is not for this run: .*{difference}"):
        train_student(tiny.experiment(override), str(cache), str(tmp_path / "run"), tiny.CPU)
    assert not (tmp_path / "run").exists()


def test_a_cache_with_another_class_order_is_refused(cache):
    from dataclasses import replace

    config = tiny.experiment()
    train, _, _ = datasets.load(config.data)
    swapped = replace(train, classes=("1", "0", *train.classes[2:]))
    with pytest.raises(CacheError, match="classes: class 0 is '0' in the store and '1' in the run"):
        open_matching_cache(str(cache), config, swapped)


def test_an_incomplete_cache_is_refused_and_a_resumed_one_is_the_uninterrupted_one(tmp_path, teacher_run, cache, monkeypatch):
    from offline_bkd.cache import CacheWriter

    config, write, written = tiny.experiment(tiny.EXACT), CacheWriter.write, []

    def stop(self, view, block, *answers, **named):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(view)
        write(self, view, block, *answers, **named)

    path = tmp_path / "cut.zarr"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CacheWriter, "write", stop)
        dump_logits(config, [str(teacher_run)], str(path), tiny.CPU)
    with pytest.raises(CacheError, match="lacks 5 blocks; finish it with dump-logits --resume"):
        train_student(config, str(path), str(tmp_path / "run"), tiny.CPU)
    with pytest.raises(CacheError, match="is not empty"):
        dump_logits(config, [str(teacher_run)], str(path), tiny.CPU)
    dump_logits(config, [str(teacher_run)], str(path), tiny.CPU, resume=True)
    whole, resumed = ({p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in (cache, path))
    assert resumed == whole


def test_seeded_crops_walk_too_one_plane_an_epoch(tmp_path):
    """Random-resized crops of image files: dumped, trained from, with the next plane read ahead."""
    from test_folders import folder_of_images

    from offline_bkd.pipeline.train import train_teacher

    folder_of_images(tmp_path)
    config = tiny.experiment(
        f"data={{name: imagefolder, root: {tmp_path}, workers: 0}}",
        "views={name: random_resized_crop, size: 8, count: 3}",
        "student.training.epochs=4",
        "student.method={name: kd}",
        tiny.EXACT,
    )
    train_teacher(config, str(tmp_path / "teacher"), tiny.CPU)
    dump_logits(config, [str(tmp_path / "teacher")], str(tmp_path / "cache.zarr"), tiny.CPU)
    train_student(config, str(tmp_path / "cache.zarr"), str(tmp_path / "student"), tiny.CPU)
    assert len(runs.open_run(tmp_path / "student").metrics()) == 4
    train_student(config, str(tmp_path / "cache.zarr"), str(tmp_path / "student"), tiny.CPU, seeds=(1, 0))
    beside = runs.open_run(tmp_path / "student-0").summary()["digest"]
    assert beside == runs.open_run(tmp_path / "student").summary()["digest"], "each has planes of its own"
    cache = open_cache(tmp_path / "cache.zarr")
    read, stored_plane = [], cache.stored_plane
    cache.stored_plane = lambda view, out=None: read.append(view) or stored_plane(view, out)
    targets, drawn = Targets(cache, tiny.CPU), [config.views.draw(0, epoch, cache.sample_id) for epoch in range(4)]
    for epoch in range(3):
        targets.prepare((np.arange(6), drawn[epoch]), (np.arange(6), drawn[epoch + 1]))
        gathered = targets.probability(torch.arange(6), torch.from_numpy(drawn[epoch]))
        np.testing.assert_array_equal(gathered, open_cache(tmp_path / "cache.zarr").plane(int(drawn[epoch][0])))
        assert len(targets.codes) == 6
    targets.reader.shutdown()
    assert sorted(read) == [0, 1, 2], "each plane is read once; the fourth epoch begins with the plane that is held"


def test_of_answers_that_memory_has_no_room_for_those_that_an_epoch_draws_are_held(tmp_path, cache, monkeypatch, device):
    from offline_bkd.pipeline.training import targets

    held: list[np.ndarray] = []
    train_student(tiny.experiment(), str(cache), str(tmp_path / "all"), device)
    hold = targets.Targets._hold
    monkeypatch.setattr(targets, "ROOM", 0)
    monkeypatch.setattr(targets.Targets, "_hold", lambda self, pairs, codes: held.append(pairs) or hold(self, pairs, codes))
    train_student(tiny.experiment(), str(cache), str(tmp_path / "drawn"), device)
    assert runs.open_run(tmp_path / "drawn").summary()["digest"] == runs.open_run(tmp_path / "all").summary()["digest"]
    assert len(held) == tiny.experiment().student.training.epochs and all(len(pairs) <= 464 for pairs in held)


def test_verify_agrees_with_the_teacher_and_notices_another(tmp_path, teacher_run, cache):
    report = verify_cache(str(cache), [str(teacher_run)], 2, None, (), tiny.CPU)
    assert report["passed"] and report["worst"] < 1e-6 and len(report["views"]) == 2 and len(report["classes"]) == 10
    from offline_bkd.pipeline.train import train_teacher

    train_teacher(tiny.experiment(seed=5), str(tmp_path / "other"), tiny.CPU)
    with pytest.raises(CacheError, match="teacher.digest: .*; give the runs of the teachers as they were"):
        verify_cache(str(cache), [str(tmp_path / "other")], 2, None, (), tiny.CPU)


def test_any_complete_run_may_teach_and_no_other(tmp_path, cache):
    train, _, _ = datasets.load(tiny.experiment().data)
    with pytest.raises(UserError, match="is not a run's folder"):
        load_teacher(str(tmp_path), train)
    train_student(tiny.experiment(), str(cache), str(tmp_path / "student"), tiny.CPU)
    assert load_teacher(str(tmp_path / "student"), train)[1]["method"] == "bkd", "whoever trained it, and however"
    (tmp_path / "student" / "summary.json").unlink()
    with pytest.raises(UserError, match="is not complete; go on with it by --resume"):
        load_teacher(str(tmp_path / "student"), train)


def test_a_checkpoint_that_is_not_the_summarys_is_refused(tmp_path, teacher_run):
    from dataclasses import replace

    train, _, _ = datasets.load(tiny.experiment().data)
    shutil.copytree(teacher_run, tmp_path / "teacher")
    run = runs.Run(tmp_path / "teacher")
    state, _ = run.load_tensors("last")
    run.save_tensors("last", {name: value + 1 for name, value in state.items()})
    with pytest.raises(UserError, match="is not the checkpoint its summary.json describes"):
        load_teacher(str(run.folder), train)
    with pytest.raises(UserError, match="knows other classes than digits"):
        load_teacher(str(teacher_run), replace(train, classes=tuple("abcdefghij")))
    (run.folder / "last.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot read the checkpoint .*last.safetensors"):
        load_teacher(str(run.folder), train)


def test_one_decode_of_an_image_serves_several_views_and_an_interruption_changes_no_byte(tmp_path, monkeypatch):
    from test_folders import folder_of_images

    from offline_bkd.cache import CacheWriter
    from offline_bkd.pipeline.dump import writing
    from offline_bkd.pipeline.train import train_teacher

    folder_of_images(tmp_path)
    noise = np.random.default_rng(0)
    for path in (tmp_path / "train").rglob("*.png"):  # so that each crop has another answer
        Image.fromarray(noise.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    views = "views={name: random_resized_crop, size: 8, count: 5}"
    config = tiny.experiment(f"data={{name: imagefolder, root: {tmp_path}, workers: 0}}", views, tiny.EXACT)
    train_teacher(config, str(tmp_path / "teacher"), tiny.CPU)
    # two views fit into memory at a time, so the groups are (0, 1), (2, 3), (4)
    monkeypatch.setattr(writing, "GROUP_BYTES", 2 * 6 * 2 * 4)
    decoded, decode, write = [], datasets.Dataset.decode, CacheWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "decode", lambda self, row: decoded.append(row) or decode(self, row))
        dump_logits(config, [str(tmp_path / "teacher")], str(tmp_path / "whole.zarr"), tiny.CPU)
    assert decoded == [*range(6)] * 3
    whole = open_cache(tmp_path / "whole.zarr")
    assert np.ptp([whole.plane(view) for view in range(5)], axis=(0, 1)).min() > 1e-3
    found = verify_cache(str(tmp_path / "whole.zarr"), [str(tmp_path / "teacher")], 5, None, (), tiny.CPU)
    assert found["worst"] < 1e-6 and sorted(found["views"]) == [*range(5)]

    def stop(self, view, block, *answers):
        if view == 3:
            raise OSError("the disk is gone")
        write(self, view, block, *answers)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
        patch.setattr(CacheWriter, "write", stop)
        dump_logits(config, [str(tmp_path / "teacher")], str(tmp_path / "cut.zarr"), tiny.CPU)
    assert open_cache(tmp_path / "cut.zarr").missing() == [(3, 0), (4, 0)]
    dump_logits(config, [str(tmp_path / "teacher")], str(tmp_path / "cut.zarr"), tiny.CPU, resume=True)
    for path in (tmp_path / "whole.zarr").rglob("c.*"):
        assert path.read_bytes() == (tmp_path / "cut.zarr" / path.relative_to(tmp_path / "whole.zarr")).read_bytes()


def test_a_teacher_whose_answer_is_not_finite_stops_the_dump_and_names_the_sample(tmp_path, teacher_run, monkeypatch):
    from offline_bkd.pipeline import teachers

    def poisoned(*arguments):
        found = infer(*arguments).clone()
        found[7] = float("nan")
        return found

    infer = teachers.infer
    monkeypatch.setattr(teachers, "infer", poisoned)
    train, _, _ = datasets.load(tiny.experiment().data)
    with pytest.raises(ValueError, match=rf"sample {train.sample_id[7]}, view 0"):
        dump_logits(tiny.experiment(), [str(teacher_run)], str(tmp_path / "c.zarr"), tiny.CPU)


def test_features_are_named_after_folders_that_may_name_them(tmp_path, teacher_run):
    folder = tmp_path / "teacher, seed 0"
    shutil.copytree(teacher_run, folder)
    with pytest.raises(UserError, match="letters, digits, _ and -, found 'teacher, seed 0'; rename the teacher's folder"):
        dump_logits(tiny.experiment("cache.features=true"), [str(folder)], str(tmp_path / "c.zarr"), tiny.CPU)
    with pytest.raises(UserError, match="rename the teacher's folder"):
        show_dump_plan(tiny.experiment("cache.features=true"), tiny.CPU, [str(folder)], str(tmp_path / "c.zarr"))
    assert not (tmp_path / "c.zarr").exists()


def test_a_dry_run_of_a_dump_is_of_the_teachers_that_are_named(tmp_path, teacher_run, capsys):
    def parameters(*teachers):
        show_dump_plan(tiny.experiment("teacher.model.depth=14"), tiny.CPU, list(map(str, teachers)), str(tmp_path / "c.zarr"))
        return re.search(r"parameters\W+([\d,]+)", capsys.readouterr().out)[1]

    network, _ = load_teacher(str(teacher_run), datasets.load(tiny.experiment().data).training)
    assert parameters(teacher_run) == f"{sum(parameter.numel() for parameter in network.parameters()):,}"
    assert parameters(teacher_run) != parameters(tmp_path / "yet to be made")


def test_a_run_goes_on_with_the_cache_it_began_with_and_with_no_other(tmp_path, cache, teacher_run, monkeypatch):
    from offline_bkd.pipeline.training import engine

    config = tiny.experiment("student.training.epochs=3")
    half = tiny.experiment("student.training.epochs=3", "cache.encoding={name: probability, dtype: float16}")
    dump_logits(half, [str(teacher_run)], str(tmp_path / "other.zarr"), tiny.CPU)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_line", stop)
        train_student(config, str(cache), str(tmp_path / "run"), tiny.CPU)
    with pytest.raises(UserError, match="began with another cache, backbone or import; name that, or another folder"):
        train_student(config, str(tmp_path / "other.zarr"), str(tmp_path / "run"), tiny.CPU, resume=True)
    train_student(config, str(cache), str(tmp_path / "run"), tiny.CPU, resume=True)
    assert len(runs.open_run(tmp_path / "run").metrics()) == 3


def test_a_folder_has_one_writer_and_what_was_cut_before_it_began_is_no_run(tmp_path):
    config = tiny.experiment("student.method={name: ce}")
    with runs.start_run(tmp_path / "run", config, "student", tiny.CPU, resume=False):
        with pytest.raises(UserError, match="another command is writing into"):
            train_student(config, None, str(tmp_path / "run"), tiny.CPU, resume=True)
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "run" / "environment.json", tmp_path / "cut")
    (tmp_path / "cut" / "config.yaml.0123456789abcdef.partial").write_text("na")
    train_student(config, None, str(tmp_path / "cut"), tiny.CPU)
    assert runs.open_run(tmp_path / "cut").summary()["method"] == "ce"


def test_where_nothing_can_be_locked_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"lies where nothing can be locked \(Function not implemented\); name a folder"):
        train_student(tiny.experiment("student.method={name: ce}"), None, str(tmp_path / "run"), tiny.CPU)


@pytest.mark.parametrize(("name", "text"), [("environment.json", '{"mine": 1}'), ("film.mkv.partial", "half of it")])
def test_a_file_of_another_program_is_never_taken_for_a_run_s_own(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    for resume, message in (False, "is not empty"), (True, "holds no run to resume"):
        with pytest.raises(UserError, match=message):
            train_student(tiny.experiment("student.method={name: ce}"), None, str(tmp_path), tiny.CPU, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == text


def test_a_report_tells_experiments_apart_and_takes_no_run_twice(tmp_path):
    from offline_bkd.pipeline.show.report import write_report

    def made(method, seed, folder, overrides=(), part=PART):
        make_run(folder, list("0123456789"), method, seed, evaluated=False, overrides=overrides, part=part)

    folders = {}
    for name, epochs, seed in (("a", 1, 0), ("b", 1, 1), ("c", 2, 0)):
        folders[name] = str(tmp_path / name)
        made("ce", seed, tmp_path / name, [f"student.training.epochs={epochs}"])
    table = write_report(list(folders.values()), str(tmp_path / "report")).table
    assert [row[:2] for row in table[1:]] == [["CE student (a)", "2"], ["CE student (c)", "1"]]
    found = [runs.open_run(folders[name]).summary()["last"]["top1"] for name in "ab"]
    assert table[1][2] == f"{np.mean(found):.2f} ± {np.std(found, ddof=1):.2f}"
    with pytest.raises(UserError, match="repeats the experiment and the seed of .*; name one of them"):
        write_report([folders["a"], folders["a"]], str(tmp_path / "twice"))
    with pytest.raises(UserError, match="is a run's folder; name another one"):
        write_report([folders["a"]], folders["b"])
    made("ce", 0, tmp_path / "d", part=PART | {"images": "d"})
    with pytest.raises(UserError, match="were trained or tested on different data"):
        write_report([folders["a"], str(tmp_path / "d")], str(tmp_path / "mixed"))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("summary.json", "{", "summary.json is missing or damaged"),
        ("summary.json", "{}", "summary.json is missing or damaged .method: Field required"),
        ("summary.json", lambda found: found["last"].update(many="x"), "last.many: Input should be a valid number"),
        ("summary.json", lambda found: found["last"]["per_class"].pop(), "class_counts and per_class are not of 10 classes"),
        ("summary.json", lambda found: found["class_counts"].__setitem__(0, -5), "class_counts.0: Input should be greater"),
        ("environment.json", None, "environment.json is missing or damaged"),
        ("config.yaml", "width: 8", "last.safetensors in .* does not fit its config.yaml"),
        ("last.safetensors", "best", "is not the checkpoint its summary.json describes"),
    ],
)
def test_a_damaged_run_is_named(tmp_path, teacher_run, file, damage, message):
    from offline_bkd.pipeline.evaluate import ask_run

    shutil.copytree(teacher_run, tmp_path / "run")
    path = tmp_path / "run" / file
    if damage is None:
        path.unlink()
    elif damage == "width: 8":
        lines = path.read_text().replace("width: 4", damage).splitlines(keepends=True)
        path.write_text("".join(lines[:-1]))  # without its checksum, as earlier versions wrote it
    elif damage == "best":
        run = runs.Run(tmp_path / "run")
        run.save_tensors("last", {name: value * 2 for name, value in run.load_tensors("best")[0].items()})
    elif callable(damage):
        found = json.loads(path.read_text())
        damage(found)
        path.write_text(json.dumps(found))
    else:
        path.write_text(damage)
    with pytest.raises(UserError, match=message):
        ask_run(str(tmp_path / "run"), "last", (), tiny.CPU)


def test_a_network_that_cannot_take_its_batches_is_refused_before_anything_is_written(tmp_path):
    """A last batch of one image leaves nothing to normalise over where the features are one pixel."""
    config = tiny.experiment(
        "student.model={name: torchvision, architecture: resnet18}",
        "student.method={name: ce}",
        "student.training.batch_size=463",
    )
    with pytest.raises(UserError, match="cannot train on 1 image of .8, 8. pixels"):
        train_student(config, None, str(tmp_path / "run"), tiny.CPU)
    config = tiny.experiment("student.model={name: torchvision, architecture: alexnet}", "student.method={name: ce}")
    with pytest.raises(UserError, match="cannot train on 64 images"):
        train_student(config, None, str(tmp_path / "run"), tiny.CPU)
    assert not (tmp_path / "run").exists()


def test_of_several_processes_on_cpus_each_share_of_a_batch_is_one_that_the_network_takes():
    config = tiny.experiment("student.model={name: torchvision, architecture: resnet18}")
    training_set = datasets.load(config.data).training
    images, data = open_images(training_set, config.views, tiny.CPU, 0), config.data
    network = build_model(config.student.model, 10, data, 0, images.crop_size)
    for samples, world, sizes in (131, 1, {64, 3}), (130, 2, {32, 2}), (132, 4, {16, 2}), (3, 2, {2, 1}), (131, 2, {32, 2, 1}):
        found = batch_sizes(samples, 64, world, tiny.CPU)
        assert found == sizes, (samples, world)
        if 1 not in sizes:
            requirements.refuse_unfit(network, images, found)
    with pytest.raises(UserError, match="cannot train on 1 image of .8, 8. pixels"):
        requirements.refuse_unfit(network, images, found)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("of the card"), RuntimeError("CUDA error: no kernel image")])
def test_what_fails_on_the_device_is_not_blamed_on_the_network(error):
    class Failing(torch.nn.Module):
        def forward(self, images):
            raise error

    config = tiny.experiment()
    images = open_images(datasets.load(config.data).training, config.views, tiny.CPU, 0)
    with pytest.raises(type(error), match=str(error)):
        requirements.refuse_unfit(Failing(), images, {64})


def test_features_are_dumped_beside_the_probabilities(tmp_path, teacher_run):
    from offline_bkd.pipeline.train import train_teacher

    config = tiny.experiment(tiny.EXACT, "cache.features=true")
    train_teacher(tiny.experiment(seed=5), str(tmp_path / "other"), tiny.CPU)
    both = [str(teacher_run), str(tmp_path / "other")]
    dump_logits(config, both, str(tmp_path / "both.zarr"), tiny.CPU)
    dump_logits(config, both, str(tmp_path / "apart"), tiny.CPU, apart=True)
    cache = open_cache(tmp_path / "both.zarr")
    assert cache.features == {"other": 16, "teacher": 16}
    train, _, _ = datasets.load(config.data)
    images = open_images(train, config.views, tiny.CPU, 0)
    rows, views = torch.arange(464), torch.full((464,), 5)
    for name, folder in {"teacher": teacher_run, "other": tmp_path / "other"}.items():
        network = load_teacher(str(folder), train)[0]
        with torch.no_grad():
            pixels = (images.crop(rows, views) - network.mean) / network.std
            exact = torch.nn.functional.normalize(network.network.shared(pixels).mean((2, 3))).numpy()
        stored = cache.feature_plane(name, 5)
        assert 0 < (1 - (stored * exact).sum(1)).max() < 1e-3, "cosine distance"
        alone = open_cache(tmp_path / "apart" / f"{name}.zarr")
        assert list(alone.features) == [name]
        np.testing.assert_array_equal(alone.feature_plane(name, 5), stored)
