"""timm's networks: the same answers as in timm itself, its configuration where none is given, weights from files."""

import argparse
import sys
from collections import OrderedDict

import pytest
import tiny
import torch
from safetensors.torch import save_file

from offline_bkd.cache import open_cache
from offline_bkd.pipeline import UserError, runs, schema
from offline_bkd.pipeline.dump import dump_logits
from offline_bkd.pipeline.evaluate import ask_run
from offline_bkd.pipeline.models import build_model, classifier
from offline_bkd.pipeline.train import train_student, train_teacher

timm = pytest.importorskip("timm")
DATA = schema.Digits(name="digits")
VIT = "{name: timm, architecture: test_vit, input_size: 8, patch_size: 4}"
CONVNEXT = "{name: timm, architecture: test_convnext, patch_size: 1, drop_path: 0.1}"


def section(architecture: str, **values) -> schema.TimmModel:
    return schema.TimmModel(name="timm", architecture=architecture, **values)


def build(architecture: str, size=(32, 32), data=DATA, **values):
    return build_model(section(architecture, **values), 5, data, 0, size).eval()


def theirs(architecture: str, classes: int = 5, **options) -> torch.nn.Module:
    """timm's own network with weights in which nothing is constant."""
    network = timm.create_model(architecture, num_classes=classes, **options)
    generator = torch.Generator().manual_seed(1)
    for value in network.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) * 0.2 + 0.01)
    return network.eval()


def images(side: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def normalised(network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    return (pixels / 255 - mean) / std


@pytest.mark.parametrize(
    ("architecture", "options"), [("test_vit", {"img_size": 32}), ("test_convnext", {}), ("test_resnet", {})]
)
def test_logits_and_features_are_timms_own(tmp_path, architecture, options):
    network = theirs(architecture, **options)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    ours = build(architecture, input_size=options.get("img_size"), weights=str(tmp_path / "weights.safetensors"))
    seen = []
    classifier(ours).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        inside = normalised(network, images())
        torch.testing.assert_close(ours(images()), network(inside), rtol=1e-4, atol=1e-4)
        feature = network.forward_head(network.forward_features(inside), pre_logits=True)
    assert feature.shape == (3, classifier(ours).in_features)
    torch.testing.assert_close(seen[0], feature, rtol=1e-4, atol=1e-4)


def test_a_classifier_that_is_not_the_last_of_the_networks_layers_is_still_the_classifier():
    network = build("test_vit", input_size=32)
    network.network.register_module("later", torch.nn.Linear(3, 3))
    assert classifier(network) is network.network.head


def test_configuration_is_timms_unless_given():
    vit, given = build("test_vit.r160_in1k", (160, 160)), DATA.model_copy(update={"mean": (0.1, 0.2, 0.3)})
    own = timm.get_pretrained_cfg("test_vit.r160_in1k")
    torch.testing.assert_close(vit.mean.flatten() / 255, torch.tensor(own.mean))
    torch.testing.assert_close(vit.std.flatten() / 255, torch.tensor(own.std))
    other = build("test_vit.r160_in1k", (160, 160), given)
    torch.testing.assert_close(other.mean.flatten() / 255, torch.tensor(given.mean))
    torch.testing.assert_close(other.std, vit.std)
    imagenet = build_model(schema.CifarResNet(name="cifar_resnet", depth=8), 5, DATA, 0)
    torch.testing.assert_close(imagenet.mean.flatten() / 255, torch.tensor([0.485, 0.456, 0.406]))
    rates = [module.drop_prob for module in build("test_convnext", drop_path=0.3).modules() if hasattr(module, "drop_prob")]
    assert max(rates) == pytest.approx(0.3)
    with pytest.raises(UserError, match="takes images of 160 x 160 pixels, the views give 32 x 32; set .*input_size=32"):
        build("test_vit")


def test_initial_weights_follow_from_the_seed_alone():
    state = build("test_convnext").state_dict()
    torch.rand(5)
    again = build("test_convnext").state_dict()
    other = build_model(section("test_convnext"), 5, DATA, 1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert not torch.equal(state["network.stem.0.weight"], other["network.stem.0.weight"])


def test_a_training_checkpoint_is_read_without_running_what_is_in_it(tmp_path):
    """As timm's train.py writes it, with the arguments of the command; and with an object that would run on unpickling."""

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    network = theirs("test_convnext")
    checkpoint = {"epoch": 3, "arch": "test_convnext", "state_dict": OrderedDict(network.state_dict()), "args": Trap()}
    torch.save({**checkpoint, "config": argparse.Namespace(lr=0.1)}, tmp_path / "last.pth.tar")
    ours = build("test_convnext", weights=str(tmp_path / "last.pth.tar"))
    torch.testing.assert_close(ours(images()), network(normalised(network, images())), rtol=1e-4, atol=1e-4)
    assert not (tmp_path / "sprung").exists()
    torch.save({**checkpoint, "state_dict_ema": network.state_dict()}, tmp_path / "both.pth")
    with pytest.raises(UserError, match="hold the network 2 times: under 'state_dict.', 'state_dict_ema.'; save the one"):
        build("test_convnext", weights=str(tmp_path / "both.pth"))


def test_weights_of_other_classes_and_another_input_size_are_taken_and_a_foreign_network_is_refused(tmp_path):
    network = theirs("test_vit", classes=7, img_size=64)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    ours = build("test_vit", input_size=32, weights=str(tmp_path / "vit.pth")).network
    assert torch.equal(ours.blocks[1].attn.qkv.weight, network.blocks[1].attn.qkv.weight)
    assert ours.head.weight.shape == (5, 64) and ours.pos_embed.shape[1] == 5, "which timm interpolates"
    assert torch.equal(ours.head.weight, build("test_vit", input_size=32).network.head.weight), "and draws the classifier"
    with pytest.raises(UserError, match=r"vit.pth into timm's test_convnext .KeyError: 'blocks.0.attn.qkv.weight'"):
        build("test_convnext", weights=str(tmp_path / "vit.pth"))


def test_the_hub_is_asked_only_where_its_weights_are_named(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", refuse)
    build("test_convnext")
    with pytest.raises(UserError, match="cannot load weights DEFAULT into timm's test_convnext .ConnectionError: no route"):
        build("test_convnext", weights="DEFAULT")
    with pytest.raises(UserError, match="no weights 'IMAGENET1K_V1' of test_convnext; timm's own are DEFAULT; or give"):
        build("test_convnext", weights="IMAGENET1K_V1")
    with pytest.raises(UserError, match="cannot load weights .*nothing.pth"):
        build("test_convnext", weights=str(tmp_path / "nothing.pth"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"architecture": "vit_tiny_patch16_225"},
            "timm has no classifier 'vit_tiny_patch16_225'; did you mean 'vit_",
        ),
        ({"architecture": "hf-hub:timm/resnet18"}, "timm has no classifier"),
        ({"architecture": "resnet18.nothing"}, "timm's resnet18 has no tag 'nothing'; it has a1_in1k"),
        (
            {"architecture": "resnet18", "input_size": 32},
            "resnet18 does not take these settings .*'img_size'.; change",
        ),
        ({"architecture": "deit_tiny_distilled_patch16_224", "input_size": 32}, "is a tuple, not one linear layer"),
    ],
)
def test_what_timm_does_not_have_or_take_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        build(**values)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "{name: timm, architecture: resnet18, branches: 2}",
            "memory and branches change the last stage of a ResNet",
        ),
        ("{name: timm, architecture: resnet18, memory: true}", "memory and branches change the last stage"),
        ("{name: timm, architecture: resnet18, zero_init_residual: true}", "begin as their shortcuts by themselves"),
    ],
)
def test_what_changes_a_resnet_of_ours_is_refused_with_the_reason(override, message):
    with pytest.raises(UserError, match=message):
        tiny.experiment(f"teacher.model={override}")


def test_without_the_package_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.delitem(sys.modules, "offline_bkd.pipeline.models.timm_models", raising=False)
    with pytest.raises(UserError, match=r'^model.name timm needs the package timm; run: pip install "\.\[timm\]"$'):
        build("test_convnext")


def test_a_vision_transformer_teaches_a_convnext_from_its_cache(tmp_path):
    experiment = tiny.experiment(
        f"teacher.model={VIT}",
        f"student.model={CONVNEXT}",
        "teacher.training={epochs: 1, batch_size: 64, learning_rate: 0.01}",
        "student.training={epochs: 1, batch_size: 64, learning_rate: 0.01}",
        "views={name: crop_flip, pad: 0, flip: false}",
        "cache.features=true",
    )
    train_teacher(experiment, str(tmp_path / "teacher"), tiny.CPU)
    dump_logits(experiment, [str(tmp_path / "teacher")], str(tmp_path / "cache.zarr"), tiny.CPU)
    assert open_cache(tmp_path / "cache.zarr").features == {"teacher": 64}, "the width of the transformer's token"
    train_student(experiment, str(tmp_path / "cache.zarr"), str(tmp_path / "student"), tiny.CPU)
    for name in ("teacher", "student"):
        scores = runs.open_run(tmp_path / name).summary()["last"]
        assert ask_run(str(tmp_path / name), "last", (), tiny.CPU).scores == {k: v for k, v in scores.items() if k != "epoch"}
