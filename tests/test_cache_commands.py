"""`inspect`, `verify` and `export` tell the truth about a store, and nothing that was not looked at is called well."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from cache_store import TWO_VIEWS, arguments, dump, files, fill, identity
from click.testing import CliRunner

from offline_bkd import cli
from offline_bkd.cache import Cache, CacheError, CropFlip, create_cache, format, open_cache, philox
from offline_bkd.pipeline import verify
from offline_bkd.pipeline.cached_targets import CachedTargets
from offline_bkd.pipeline.dump import dump_logits, writing
from offline_bkd.pipeline.train import train_student


def run(*words):
    result = CliRunner().invoke(cli.main, list(map(str, words)))
    return result.exit_code, result.output


def test_checksums_of_a_whole_store_are_well(tmp_path):
    dump(tmp_path / "s", **TWO_VIEWS)
    assert run("verify", tmp_path / "s", "--checksums") == (
        0,
        f"{tmp_path}/s\nPASSED, 2 blocks: every stored byte is as it was written\n",
    )


@pytest.mark.parametrize("done", [0, 1])
def test_checksums_of_an_unfinished_store_are_not_well(tmp_path, done):
    with create_cache(tmp_path / "s", **arguments(**TWO_VIEWS)) as writer:
        fill(writer, writer.pending()[:done])
    assert f"\nnot whole: {2 - done} of 2 blocks are missing; " in run("inspect", tmp_path / "s")[1]
    code, said = run("verify", tmp_path / "s", "--checksums")
    assert code == 1 and said.splitlines() == [
        f"{tmp_path}/s",
        f"{2 - done} of 2 blocks are not dumped; finish it with dump-logits --resume",
        "FAILED, 1 problem",
    ]


def test_damage_is_listed_and_exits_with_1(tmp_path):
    dump(tmp_path / "s", **TWO_VIEWS)
    path = tmp_path / "s/probability/c.1.0.0"
    path.write_bytes(path.read_bytes()[:-9])
    code, said = run("verify", tmp_path / "s", "--checksums")
    assert code == 1 and "view 1, rows 0 to 359 is damaged" in said and said.endswith("\nFAILED, 1 problem\n")
    report = json.loads(run("verify", tmp_path / "s", "--checksums", "--json")[1])
    assert report["passed"] is False and len(report["problems"]) == 1 and report["blocks"] == 2


def test_a_names_control_characters_do_not_reach_the_terminal(tmp_path):
    names = "apple\x1b]0;owned\x07", "fish\x9b31m", "baby\n", "bear\u202e", "beaver"
    teacher = {"digest": "cc", "note": "\x1b[2J"}
    dump(tmp_path / "s", identity=identity(classes=names, views=CropFlip(pad=0), teacher=teacher))
    code, said = run("inspect", tmp_path / "s", "--all")
    assert code == 0 and "\\x1b]0;owned\\x07" in said and "\\x1b[2J" in said
    assert not {character for character in said if not character.isprintable()} - {"\n"}
    assert json.loads(run("inspect", tmp_path / "s", "--json")[1])["identity"]["classes"] == list(names)


def test_what_a_person_is_told_fits_the_terminal_and_ends_in_a_verdict(tmp_path, teacher_run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    dump_logits(tiny.experiment(), [str(teacher_run)], "whole", tiny.CPU)
    with create_cache("half", **arguments(**TWO_VIEWS)) as writer:
        fill(writer, writer.pending()[:1])
    shutil.copytree(teacher_run, tmp_path / "teacher")  # evaluate writes into it
    again = "verify", "whole", "--teacher", "teacher", "--device", "cpu"
    for words, verdict in {
        ("inspect", "whole"): "whole: all 9 blocks are there",
        ("inspect", "half"): "not whole: 1 of 2 blocks are missing; finish it with dump-logits --resume",
        again: "PASSED",
        (*again, "--all"): "PASSED",
        (*again, "--tolerance", "0"): "FAILED",
        ("verify", "whole", "--checksums"): "PASSED, 9 blocks: every stored byte is as it was written",
        ("evaluate", "teacher", "--device", "cpu"): "every class and every confusion: teacher/evaluation-last",
        ("report", "teacher", "--out", "report"): "in few-shot classes",
    }.items():
        said = run(*words)[1]
        assert max(map(len, said.splitlines())) <= 60 and " ".join(said.split()).endswith(verdict), words
    report = json.loads(run(*again, "--json")[1])
    worst = sorted(report["classes"], key=lambda name: -report["classes"][name])[:5]
    said = run(*again)[1]
    rows = [line.split() for line in said[said.index("the worst classes") :].splitlines() if line.startswith("│")]
    assert [row[1] for row in rows] == worst and report["passed"] is True and report["missing_blocks"] == 0


def test_inspect_says_which_temperatures_a_store_serves(tmp_path):
    dump(tmp_path / "s", **TWO_VIEWS, encoding={"name": "logit"})
    assert "serves 0.01 to 1000" in run("inspect", tmp_path / "s")[1]
    code, said = run("inspect", tmp_path / "s", "--all")
    assert code == 0 and "temperatures" in said and "[0.01, 1000.0]" in said


def test_a_dump_goes_on_only_as_it_was_begun(tmp_path, cache, teacher_run, capsys):
    path = tmp_path / "cache.zarr"
    shutil.copytree(cache, path)
    (path / "done/4.0").unlink()
    before = files(path)
    with pytest.raises(CacheError, match="precision: the store has float32, the run has bfloat16; choose another folder"):
        dump_logits(
            tiny.experiment(tiny.EXACT, "cache.precision=bfloat16"), [str(teacher_run)], str(path), tiny.CPU, resume=True
        )
    assert files(path) == before
    capsys.readouterr()
    dump_logits(tiny.experiment(tiny.EXACT, "cache.batch_size=100"), [str(teacher_run)], str(path), tiny.CPU, resume=True)
    said = "begun otherwise, environment.batch_size: the store has 512, the run has 100; answers may differ in their last bits"
    shown = capsys.readouterr().out
    assert shown.count("note: ") == 1 and said in shown and open_cache(path).complete
    assert files(path).keys() == before.keys() | {"done/4.0"}


def test_a_resumed_dump_says_and_writes_again_what_has_lost_files(tmp_path, cache, teacher_run, capsys):
    path = tmp_path / "cache.zarr"
    shutil.copytree(cache, path)
    before = files(path)
    (path / "probability/c.0.0.0").unlink(), (path / "probability/c.7.0.0").write_bytes(b"")
    assert "not whole: 2 blocks lost files, or parts of them; finish it with" in run("inspect", path)[1]
    report = json.loads(run("inspect", path, "--json")[1])
    assert report["blocks"]["lost"] == 2 and report["complete"] is False
    with pytest.raises(CacheError, match="2 blocks lost files, or parts of them; write them again with dump-logits --resume"):
        train_student(tiny.experiment(), str(path), str(tmp_path / "student"), tiny.CPU)
    with pytest.raises(CacheError, match="2 blocks lost files"):
        CachedTargets(path, range(464))
    capsys.readouterr()
    for note in f"note: {path}: 2 blocks had lost files, or parts of them, and will be dumped again\n", "":
        dump_logits(tiny.experiment(tiny.EXACT), [str(teacher_run)], str(path), tiny.CPU, resume=True)
        assert capsys.readouterr().out == f"{note}{path}: 9 views of 464 samples\n" and files(path) == before


@pytest.mark.parametrize(
    "about",
    [
        {"model": "resnet50", "test": 71.3},
        {"model": {"name": ["a"], "cosine_scale": None}, "method": ["ce"], "seed": 1, "test": {"top1": "high"}},
    ],
)
def test_a_teacher_may_be_described_in_any_way(tmp_path, cache, pictures_of_runs, about):
    ours = open_cache(cache)
    columns = {name: getattr(ours, name) for name in ("sample_id", "label", "image_size")}
    theirs = dataclasses.replace(ours.identity, teacher={"digest": "cc", **about})
    with create_cache(tmp_path / "s", identity=theirs, encoding=ours.encoding.to_json(), **columns) as writer:
        fill(writer, answers=ours.plane)
    code, said = run("inspect", tmp_path / "s")
    assert code == 0 and "teacher cc" in said
    train_student(tiny.experiment("student.training.epochs=1"), str(tmp_path / "s"), str(tmp_path / "student"), tiny.CPU)
    assert (tmp_path / "student/accuracy_by_class.png").exists()


def test_the_samples_that_a_codebook_is_fitted_to_are_not_those_that_the_tail_was_drawn_by(tmp_path, teacher_run, monkeypatch):
    asked, real = [], writing.tempered
    monkeypatch.setattr(writing, "FIT_SAMPLES", 116)
    monkeypatch.setattr(writing, "tempered", lambda *given: asked.append(given[2]) or real(*given))
    config = tiny.experiment("cache.encoding={name: klt, max_error: 0.05}")
    dump_logits(config, [str(teacher_run)], str(tmp_path / "s"), tiny.CPU)
    drawn = np.argsort(philox.permutation(config.data.seed, philox.SUBSET, open_cache(tmp_path / "s").sample_id))
    chosen = np.unique(asked[0])
    assert len(chosen) == 116 and drawn[chosen].mean() / 464 == pytest.approx(0.5, abs=0.1)


def test_a_store_without_a_complete_view_is_not_verified(tmp_path, teacher_run, cache):
    shutil.copytree(cache, tmp_path / "s")
    for marker in (tmp_path / "s" / "done").glob("[0-9]*"):
        marker.unlink()
    code, said = run("verify", tmp_path / "s", "--teacher", teacher_run, "--device", "cpu")
    assert code == 2 and said.endswith("/s has no complete view to verify; finish it with dump-logits --resume\n")


def test_one_block_that_is_wrong_fails_though_the_mean_would_not(tmp_path, teacher_run, monkeypatch):
    monkeypatch.setattr(format, "_CHUNK_BYTES", 2 * 10 * 4)  # two rows a block, 232 blocks a view
    one_view = "views={name: crop_flip, pad: 0, flip: false}"
    dump_logits(tiny.experiment(tiny.EXACT, one_view), [str(teacher_run)], str(tmp_path / "s"), tiny.CPU)
    cache = open_cache(tmp_path / "s")
    assert (cache.views.count, cache.layout.blocks) == (1, 232)
    (tmp_path / "s/done/0.50").unlink()
    columns = {name: getattr(cache, name) for name in ("identity", "sample_id", "label", "image_size")}
    with create_cache(tmp_path / "s", resume=True, encoding=cache.encoding.to_json(), **columns) as writer:
        assert writer.pending() == [(0, 50)]
        writer.write(0, 50, np.full((2, 10), 0.01) + 0.9 * np.eye(2, 10))
    report = verify.verify_cache(str(tmp_path / "s"), [str(teacher_run)], 1, None, (), tiny.CPU)
    assert not report["passed"] and report["mean"] < report["tolerance"] < report["worst_block"]["mean"]
    assert report["worst_block"]["rows"] == [100, 102] and report["worst_block"]["view"] == 0
    code, said = run("verify", tmp_path / "s", "--teacher", teacher_run, "--views", 1, "--device", "cpu")
    assert code == 1 and "of view 0, rows 100 to 101; 0.005 is accepted" in said


def test_a_block_that_is_no_number_is_not_verified(cache, teacher_run, monkeypatch):
    read = Cache.stored_block
    broken = [(4, 0)]

    def stored_block(self, view, block):
        values = read(self, view, block)
        return np.full_like(values, np.nan) if (view, block) in broken else values

    monkeypatch.setattr(Cache, "stored_block", stored_block)
    command = "verify", cache, "--teacher", teacher_run, "--views", 9, "--device", "cpu"
    code, said = run(*command)
    assert code == 1 and said.splitlines()[-1].startswith("FAILED") and "of view 4, rows 0 to 463" in said
    broken.clear()
    assert run(*command)[0] == 0


def test_verify_computes_as_the_store_says_it_was_computed(tmp_path, teacher_run, monkeypatch):
    asked, real = [], verify.tempered
    monkeypatch.setattr(verify, "tempered", lambda *given: asked.append(given[-1].precision) or real(*given))
    dump_logits(tiny.experiment("cache.precision=bfloat16"), [str(teacher_run)], str(tmp_path / "s"), tiny.CPU)
    for overrides in (), ("cache.precision=float32",), ("cache={precision: float32}",):
        assert verify.verify_cache(str(tmp_path / "s"), [str(teacher_run)], 1, None, overrides, tiny.CPU)["passed"]
    assert asked == ["bfloat16", "float32", "float32"]
