"""Networks trained elsewhere become runs: their logits are what they were, their classes in the data's order, or they are
refused."""

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

import cli
from offline_bkd.cache import open_cache
from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.data.images import open_images
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.evaluate import ask_run, infer, load_model
from offline_bkd.pipeline.import_model import import_model, refuse_other_order
from offline_bkd.pipeline.show.report import write_report
from offline_bkd.pipeline.train import train_student, train_teacher

CLASSES = tuple("0123456789")


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    """The run of a teacher that has learnt something: what says nothing about the classes, has no order of them."""
    folder = tmp_path_factory.mktemp("import") / "teacher"
    train_teacher(tiny.experiment("teacher.training={epochs: 12, batch_size: 32, learning_rate: 0.1}"), str(folder), tiny.CPU)
    return folder


@pytest.fixture(scope="module")
def network(trained_run):
    """The tensors of its network, by the names that they have in it alone."""
    tensors, _ = runs.Run(trained_run).load_tensors("last")
    return {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}


def prefixed(prefix: str, state: dict) -> OrderedDict:
    return OrderedDict((f"{prefix}{name}", value) for name, value in state.items())


def lightning(state: dict) -> dict:
    """As a Trainer writes it, of a module that keeps its network in `model`."""
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed("model.", state) | {"criterion.weight": torch.ones(10)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.1), "dirpath": "somewhere"}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "root": Path("data"), "namespace": argparse.Namespace(depth=8)},
    }


FORMS = {
    "a plain state dict": lambda state: state,
    "DataParallel's": lambda state: prefixed("module.", state),
    "torch.compile's": lambda state: prefixed("_orig_mod.", state),
    "Lightning's": lightning,
    "timm's": lambda state: {
        "epoch": 1,
        "arch": "resnet",
        "state_dict": state,
        "optimizer": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1),
        "version": 2,
    },
    "a moving average's": lambda state: prefixed("module.", state) | {"n_averaged": torch.tensor(7)},
    "in half precision, without counters": lambda state: {
        name: value.half() for name, value in state.items() if value.is_floating_point()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoints_network_answers_as_before(tmp_path, trained_run, network, form):
    torch.save(FORMS[form](network), tmp_path / "weights.ckpt")
    scores = import_model(tiny.experiment(), str(tmp_path / "weights.ckpt"), str(tmp_path / "run"), tiny.CPU)
    run, original = runs.open_run(tmp_path / "run"), runs.open_run(trained_run).summary()
    if form.startswith("in half"):
        assert scores["top1"] == pytest.approx(original["last"]["top1"], abs=0.3)
        halved = {name: value.half().float() for name, value in network.items() if value.is_floating_point()}
        tensors, _ = run.load_tensors("last")
        assert all(torch.equal(tensors[f"network.{name}"], value) for name, value in halved.items())
    else:
        assert run.summary()["digest"] == original["digest"], "every tensor, and how pixels are normalised"
    assert ask_run(str(run.folder), "best", (), tiny.CPU).scores == scores
    assert run.summary()["source"]["file"] == "weights.ckpt" and len(run.summary()["source"]["sha256"]) == 64
    assert ("criterion.weight" in (run.folder / "log.txt").read_text()) == (form == "Lightning's"), "what is left out is said"


def accuracy(network: torch.nn.Module, mean, std, dataset) -> tuple[float, torch.Tensor]:
    """Percent right and logits of a network in its own framework, of images decoded and normalised here."""
    pixels = torch.from_numpy(np.stack([np.asarray(dataset.decode(row)) for row in range(len(dataset))])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (mean, std))
    with torch.no_grad():
        logits = network.eval()((pixels / 255 - mean) / std)
    return 100 * (logits.argmax(1).numpy() == dataset.label).mean(), logits


def test_torchvisions_and_timms_networks_answer_as_there(tmp_path):
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    torch.manual_seed(0)
    networks = {
        "{name: torchvision, architecture: resnet18}": torchvision.models.resnet18(num_classes=10),
        "{name: timm, architecture: test_convnext, patch_size: 1}": timm.create_model(
            "test_convnext", num_classes=10, patch_size=1
        ),
    }
    _, test_set, _ = datasets.load(tiny.experiment().data)
    for number, (section, network) in enumerate(networks.items()):
        experiment = tiny.experiment(f"teacher.model={section}")
        top1, logits = accuracy(network, experiment.data.mean, experiment.data.std, test_set)
        save_file(network.state_dict(), tmp_path / f"{number}.safetensors")
        folder = tmp_path / f"run-{number}"
        scores = import_model(experiment, str(tmp_path / f"{number}.safetensors"), str(folder), tiny.CPU, expected=top1)
        assert scores["top1"] == pytest.approx(top1, abs=0.3)
        model = load_model(runs.open_run(folder), "last", experiment, 10)
        images = open_images(test_set, experiment.views, tiny.CPU, 0)
        torch.testing.assert_close(infer(model, images, np.arange(len(test_set))), logits, rtol=1e-4, atol=1e-4)


def test_an_imported_network_teaches(tmp_path, trained_run, network):
    torch.save(network, tmp_path / "weights.pth")
    experiment = tiny.experiment("cache.encoding={name: probability, dtype: float32}")
    import_model(experiment, str(tmp_path / "weights.pth"), str(tmp_path / "run"), tiny.CPU)
    for name, folder in ("imported", tmp_path / "run"), ("trained", trained_run):
        dump_logits(experiment, [str(folder)], str(tmp_path / name), tiny.CPU)
    imported, trained = open_cache(tmp_path / "imported"), open_cache(tmp_path / "trained")
    assert np.array_equal(imported.plane(3), trained.plane(3))
    assert imported.identity.teacher["method"] == "imported" and imported.identity.teacher["epochs"] is None
    assert imported.identity.teacher["source"] == runs.open_run(tmp_path / "run").summary()["source"]


def test_an_imported_network_is_reported_beside_others(tmp_path, trained_run, network):
    torch.save(network, tmp_path / "weights.pth")
    import_model(tiny.experiment(), str(tmp_path / "weights.pth"), str(tmp_path / "run"), tiny.CPU)
    _, imported, trained = write_report([str(tmp_path / "run"), str(trained_run)], str(tmp_path / "report")).table
    assert (imported[0], trained[0]) == ("imported", "teacher") and imported[2:] == [*trained[2:-1], trained[2]]
    torch.save({name: value + 0 for name, value in network.items()} | {"epoch": 7}, tmp_path / "other.pth")
    import_model(tiny.experiment(), str(tmp_path / "other.pth"), str(tmp_path / "other"), tiny.CPU)
    table = write_report([str(tmp_path / "run"), str(tmp_path / "other")], str(tmp_path / "two")).table
    assert [row[:2] for row in table[1:]] == [["imported (run)", "1"], ["imported (other)", "1"]], "files, not seeds"


def test_an_import_that_was_interrupted_is_no_run_to_train(tmp_path, network):
    torch.save(network, tmp_path / "weights.pth")
    import_model(tiny.experiment(), str(tmp_path / "weights.pth"), str(tmp_path / "run"), tiny.CPU)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(UserError, match="it began with another cache, backbone or import"):
        train_teacher(tiny.experiment(), str(tmp_path / "run"), tiny.CPU, resume=True)


def test_an_imported_backbone_is_taken(tmp_path, network):
    torch.save(network, tmp_path / "weights.pth")
    experiment = tiny.experiment("student.method={name: crt}", "student.training.epochs=1")
    import_model(experiment, str(tmp_path / "weights.pth"), str(tmp_path / "run"), tiny.CPU)
    train_student(experiment, None, str(tmp_path / "crt"), tiny.CPU, backbone=str(tmp_path / "run"))
    tensors, _ = runs.open_run(tmp_path / "crt").load_tensors("last")
    assert torch.equal(tensors["network.conv1.weight"], network["conv1.weight"])


@pytest.fixture
def shuffled(tmp_path, network):
    """A checkpoint whose outputs stand in another order, and that order."""
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    state = {name: value[order] if name.startswith("fc.") else value for name, value in network.items()}
    torch.save(state, tmp_path / "weights.pth")
    (tmp_path / "classes.txt").write_text("".join(f"{CLASSES[c]}\n" for c in order))
    return str(tmp_path / "weights.pth"), tmp_path / "classes.txt"


def test_classes_in_another_order_are_mapped(tmp_path, trained_run, shuffled):
    weights, order = shuffled
    import_model(tiny.experiment(), weights, str(tmp_path / "run"), tiny.CPU, classes=str(order))
    assert runs.open_run(tmp_path / "run").summary()["digest"] == runs.open_run(trained_run).summary()["digest"]


def test_or_refused_even_where_only_two_are_exchanged(tmp_path, trained_run, network, shuffled):
    weights, order = shuffled
    first, second = np.argsort(runs.open_run(trained_run).summary()["last"]["per_class"])[-2:]  # which it knows best
    swapped = [{first: second, second: first}.get(index, index) for index in range(10)]
    exchanged = {name: value[swapped] if name.startswith("fc.") else value for name, value in network.items()}
    torch.save(exchanged, tmp_path / "exchanged.pth")
    for file in weights, str(tmp_path / "exchanged.pth"):
        with pytest.raises(
            UserError, match=r"seem to be in another order .*: \d.*% of test images are right, in another order"
        ):
            import_model(tiny.experiment(), file, str(tmp_path / "run"), tiny.CPU)
    with pytest.raises(UserError, match="is right about .*% of the test set, expected 80%: look at"):
        import_model(tiny.experiment(), weights, str(tmp_path / "run"), tiny.CPU, expected=80)
    order.write_text("".join(f"{name}\n" for name in reversed(CLASSES)))
    with pytest.raises(UserError, match="seem to be in another order"):
        import_model(tiny.experiment(), weights, str(tmp_path / "run"), tiny.CPU, classes=str(order))
    assert not (tmp_path / "run").exists()


def test_chance_is_no_other_order():
    """Of few images, or of a network that guesses, some other order is always a little better."""
    generator = np.random.default_rng(0)
    for images, classes in ((12, 3), (400, 10), (3000, 1000)):
        for _ in range(20):
            refuse_other_order(generator.integers(0, classes, images), generator.integers(0, classes, images), classes)
    label = generator.integers(0, 10, 400)
    weak = np.where(generator.random(400) < 0.3, label, 0)  # right about a third, else the first class
    refuse_other_order(weak, label, 10)
    with pytest.raises(UserError, match="seem to be in another order"):
        refuse_other_order((weak + 1) % 10, label, 10)
    in_turn = np.tile(np.arange(10), 40)  # every second image is of an odd class
    with pytest.raises(UserError, match="seem to be in another order"):
        refuse_other_order((in_turn + 1) % 10, in_turn, 10)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("0 1 2 3 4 5 6 7 8 x", "the data have no class 'x' .1 such name.; use their names"),
        ("0 1 2 3 4 5 6 7 8", "lacks the data's class '9' .1 such class."),
        ("0 1 2 3 4 5 6 7 8 9 9", "has '9' twice"),
    ],
)
def test_names_that_are_not_the_datas_are_refused(tmp_path, shuffled, names, message):
    weights, order = shuffled
    order.write_text("\n".join(names.split()))
    with pytest.raises(UserError, match=message):
        import_model(tiny.experiment(), weights, str(tmp_path / "run"), tiny.CPU, classes=str(order))
    with pytest.raises(UserError, match="--classes .*nowhere cannot be read"):
        import_model(tiny.experiment(), weights, str(tmp_path / "run"), tiny.CPU, classes=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="--classes /dev/zero cannot be read .*no regular file"):
        import_model(tiny.experiment(), weights, str(tmp_path / "run"), tiny.CPU, classes="/dev/zero")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {k: v for k, v in state.items() if k != "conv1.weight"}, "it has no conv1.weight; configure"),
        (lambda state: state | {"extra.weight": torch.zeros(1)}, "the network has no extra.weight; configure"),
        (lambda state: state | {"fc.bias": torch.zeros(100)}, r"fc.bias is \[100\], not \[10\]; configure"),
        (lambda state: state | {"fc.bias": torch.full((10,), torch.nan)}, "not all is finite in fc.bias; configure"),
        (lambda state: prefixed("layer.", state) | {"layer.fc.bias": "no tensor"}, "under 'layer.', .* it has no fc.bias"),
        (lambda state: {}, "it has no conv1.weight, bn1.weight, bn1.bias .and .* more."),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_shape(tmp_path, network, change, message):
    torch.save(change(network), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        import_model(tiny.experiment(), str(tmp_path / "weights.pth"), str(tmp_path / "run"), tiny.CPU)
    assert not (tmp_path / "run").exists()


def test_of_two_networks_in_a_file_one_is_named(tmp_path, trained_run, network):
    average = {name: value + 1 if name == "fc.bias" else value for name, value in network.items()}
    torch.save({"state_dict": prefixed("module.", network), "state_dict_ema": average}, tmp_path / "weights.pth")
    arguments = tiny.experiment(), str(tmp_path / "weights.pth"), str(tmp_path / "run"), tiny.CPU
    with pytest.raises(UserError, match="2 times; choose by --prefix one of state_dict.module., state_dict_ema."):
        import_model(*arguments)
    import_model(*arguments, prefix="state_dict_ema")
    bias = runs.open_run(tmp_path / "run").load_tensors("last")[0]["network.fc.bias"]
    assert torch.equal(bias, network["fc.bias"] + 1)
    with pytest.raises(UserError, match="under 'else.', is not of the network in teacher.model: it has no conv1.weight"):
        import_model(*arguments[:2], str(tmp_path / "other"), tiny.CPU, prefix="else")


def test_nothing_in_a_checkpoint_runs(tmp_path, network):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"state_dict": network, "args": Trap(), "hooks": [Trap()]}, tmp_path / "weights.pth")
    import_model(tiny.experiment(), str(tmp_path / "weights.pth"), str(tmp_path / "run"), tiny.CPU)
    assert not (tmp_path / "sprung").exists()


def test_the_command_takes_the_part_and_the_order_that_it_is_told(tmp_path, trained_run, shuffled):
    file, order = shuffled
    outputs = torch.load(file, weights_only=True)
    torch.save({"state_dict": outputs, "state_dict_ema": {name: value * 2 for name, value in outputs.items()}}, file)
    command = ["import-model", *tiny.options(), "--weights", file, "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--prefix", "state_dict", "--classes", str(order)])
    assert end.value.code == 0
    assert runs.open_run(tmp_path / "run").summary()["digest"] == runs.open_run(trained_run).summary()["digest"]


def test_the_command_imports_and_refuses(tmp_path, network, capsys):
    save_file(network, tmp_path / "weights")  # without a suffix
    command = ["import-model", *tiny.options(), "--out", str(tmp_path / "run"), "--weights"]
    for options, code, said in (
        ([tmp_path], 2, f"error: cannot load weights {tmp_path} (it is a folder); give a .safetensors or"),
        ([tmp_path / "weights", "--expect", "99"], 2, "expected 99%: look at the order of its classes"),
        ([tmp_path / "weights"], 0, "part '', sha256"),
        ([tmp_path / "weights"], 2, "is not empty; name another folder"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main([*command, *map(str, options)])
        output = capsys.readouterr()
        assert end.value.code == code and said in output.out + output.err
