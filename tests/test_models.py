"""Networks: the published sizes, the published shortcuts, initial weights from the seed, normalisation inside."""

from copy import deepcopy
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from offline_bkd.pipeline import UserError, schema
from offline_bkd.pipeline.config import load_config
from offline_bkd.pipeline.models import build_model, classifier
from offline_bkd.pipeline.models.classifiers import CosineClassifier

CONFIGS = Path(__file__).parent.parent / "configs"
DATA = schema.Digits(name="digits", mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))


def build(depth=8, width=16, classes=10, seed=0):
    return build_model(schema.CifarResNet(name="cifar_resnet", depth=depth, width=width), classes, DATA, seed)


# He et al. (2016), table 6, in millions
@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_parameters_are_as_many_as_published(depth, millions):
    network = build(depth)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)
    layers = [m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(layers) == depth, "every layer with weights counts, and shortcuts have none"


def test_features_are_64_numbers_and_logits_one_a_class():
    network = build(classes=7)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert network(images).shape == (2, 7) and network(images).dtype == torch.float32
    assert (
        network.network.shared(torch.zeros(2, 3, 32, 32)).mean((2, 3)).shape == (2, 64)
        and network.network.fc.in_features == 64
    )


def test_initial_weights_follow_from_the_seed_alone():
    state = build(seed=3).state_dict()
    torch.manual_seed(99)
    torch.rand(5)
    before = torch.random.get_rng_state()
    again, other = build(seed=3).state_dict(), build(seed=4).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before), "building a model leaves the global generator alone"
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["network.conv1.weight"], other["network.conv1.weight"])


def test_weights_are_kaiming_normal():
    weight = build(depth=56).network.blocks[-1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_and_activations_have_the_memory_format_that_was_asked_for(channels_last):
    section = schema.CifarResNet(name="cifar_resnet", depth=8)
    network, seen = build_model(section, 10, DATA, 0, channels_last=channels_last), []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda layer, inputs, output: seen.extend([layer.weight, *inputs, output]))
    pixels = torch.zeros(2, 8, 8, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    network(pixels), network(pixels.contiguous())
    asked = torch.channels_last if channels_last else torch.contiguous_format
    assert len(seen) == 2 * 7 * 3 and all(tensor.is_contiguous(memory_format=asked) for tensor in seen)


def test_normalisation_is_part_of_the_model():
    network = build().eval()
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor(DATA.mean).view(1, 3, 1, 1), torch.tensor(DATA.std).view(1, 3, 1, 1)
    expected = network.network((images / 255 - mean) / std)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    assert {"mean", "std"} <= set(network.state_dict())


def test_a_cosine_classifiers_weights_begin_at_length_one_as_in_ldams_code():
    weight = CosineClassifier(64, 500, 30).weight.detach()
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(500))
    scaled = weight * (64 / 3) ** 0.5  # of a point drawn from the cube [-1, 1]^64, |x|^2 is 64/3 on average
    assert scaled.abs().max() < 1.3 and scaled.abs().mean().item() == pytest.approx(0.5, abs=0.01)


def test_or_as_glorot_has_them_in_cbds_code():
    section = schema.CifarResNet(name="cifar_resnet", depth=8, cosine_scale=20, cosine_init="glorot")
    weight = classifier(build_model(section, 500, DATA, 0)).weight.detach()
    bound = (6 / (64 + 500)) ** 0.5
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    projected = section.model_copy(update={"projection": 128})
    layer = build_model(projected, 500, DATA, 0).network.fc[0]
    assert layer.weight.std().item() == pytest.approx((2 / (64 + 128)) ** 0.5, rel=0.02) and not layer.bias.any()


LAST_LAYERS = [
    {},
    {"projection": 24},
    {"cosine_scale": 30},
    {"memory": True},
    {"name": "torchvision", "architecture": "resnet10"},
    {"name": "timm", "architecture": "convnext_atto"},
]


@pytest.mark.parametrize("asked", LAST_LAYERS, ids=str)
def test_logits_are_float32s_also_of_a_bfloat16_forward(asked):
    """In bfloat16 one or two of a hundred images have two best classes, of which argmax takes the more frequent."""
    own = asked if "name" in asked else {"name": "cifar_resnet", "depth": 8, "width": 4, **asked}
    section = TypeAdapter(schema.Model).validate_python(own)
    model = build_model(section, 100, DATA, 0, (32, 32)).eval()
    last, seen = classifier(model), []
    last.register_forward_hook(lambda layer, given, logits: seen.append((given[0], logits)))
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    ((features, found),) = seen
    expected = deepcopy(last).double()(features.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(logits, found)


@pytest.mark.parametrize("architecture", ["cifar_resnet", "resnet10", "resnet50"])
def test_blocks_whose_last_scale_is_zero_begin_as_their_shortcuts(architecture):
    if architecture == "cifar_resnet":
        section = schema.CifarResNet(name="cifar_resnet", depth=14, width=4, zero_init_residual=True)
    else:
        section = schema.TorchvisionModel(name="torchvision", architecture=architecture, zero_init_residual=True)
    network = build_model(section, 5, DATA, 0).network
    plain = build_model(section.model_copy(update={"zero_init_residual": False}), 5, DATA, 0).network.state_dict()
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, plain[name])}
    blocks = [(name, block) for name, block in network.named_modules() if hasattr(block, "bn2")]
    last = "bn3" if architecture == "resnet50" else "bn2"
    assert changed == {f"{name}.{last}.weight" for name, _ in blocks} and len(blocks) > 3
    for _, block in blocks:
        x = torch.rand(2, block.conv1.in_channels, 8, 8)
        if architecture == "cifar_resnet":
            shortcut = x[:, :, :: block.stride, :: block.stride]
            missing = block.conv1.out_channels - block.conv1.in_channels
            zeros = [shortcut.new_zeros(2, size, *shortcut.shape[2:]) for size in (missing // 2, missing - missing // 2)]
            shortcut = torch.cat([zeros[0], shortcut, zeros[1]], dim=1)
        else:
            shortcut = block.downsample(x) if block.downsample else x
        torch.testing.assert_close(block(x), shortcut.relu())


def test_only_a_resnets_blocks_have_a_last_scale():
    for architecture in ("mobilenet_v2", "convnext_tiny"):  # the second's constructor would swallow torchvision's own option
        section = schema.TorchvisionModel(name="torchvision", architecture=architecture, zero_init_residual=True)
        with pytest.raises(UserError, match=f"is for a ResNet, which {architecture} is not; leave it out"):
            build_model(section, 5, DATA, 0)
    with pytest.raises(ValueError, match="weights say how blocks begin; leave out zero_init_residual"):
        schema.TorchvisionModel(name="torchvision", architecture="resnet18", weights="DEFAULT", zero_init_residual=True)


def test_the_classifier_of_two_branches_begins_as_in_bbns_code():
    """A linear layer as torch has it: uniform within 1 / sqrt(D); one branch has Kaiming's normal weights."""
    section = schema.CifarResNet(name="cifar_resnet", depth=8, branches=2)
    weight = build_model(section, 500, DATA, 0).network.fc.weight
    assert weight.shape == (500, 128) and weight.abs().max() <= 128**-0.5
    assert weight.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.01)
    assert build(classes=500).network.fc.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.01)


CBD_ROWS = sorted(
    path for path in CONFIGS.glob("**/*.yaml") if "cbd" in str(path.relative_to(CONFIGS)) and "tables" not in path.parts
)


@pytest.mark.parametrize("path", CBD_ROWS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_cbds_networks_begin_as_in_its_code(path, monkeypatch):
    monkeypatch.setenv("OFFLINE_BKD_DATA", "nowhere")
    config = load_config(path)
    for network in (config.teacher.model, config.student.model):
        assert network.cosine_scale == 20 and network.cosine_init == "glorot"
        assert network.zero_init_residual == (getattr(network, "weights", None) is None), "what is pretrained is not drawn"


def torchvision_model(**values):
    section = schema.TorchvisionModel(name="torchvision", architecture="resnet18", **values)
    return build_model(section, 5, DATA, 0)


def test_torchvisions_classifiers_are_built_by_name_and_take_weights_of_another_width(tmp_path):
    from torchvision.models import resnet18

    source = resnet18(num_classes=9)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    for name in ("weights.safetensors", "weights.pth"):
        network = torchvision_model(weights=str(tmp_path / name))
        assert torch.equal(network.network.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
        assert network.eval()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 5)


def test_resnet10_is_the_long_tailed_literatures():
    """A 7x7 convolution, four basic blocks of 64 to 512 channels and the classifier: ten layers with weights."""
    widths, classes = [64, 128, 256, 512], 1000
    expected = 3 * 64 * 7 * 7 + 2 * 64  # every convolution is normalised: a scale and a shift a channel
    for before, width in zip([64, *widths], widths):
        expected += (before + width) * width * 3 * 3 + 2 * 2 * width
        expected += before * width + 2 * width if before < width else 0  # the shortcut
    expected += (512 + 1) * classes
    section = schema.TorchvisionModel(name="torchvision", architecture="resnet10")
    network = build_model(section, classes, DATA, 0)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected == 5_418_792
    shapes = [network.network.get_submodule(f"layer{n}")(torch.zeros(1, w, 8, 8)).shape for n, w in zip((1, 2), (64, 64))]
    assert shapes == [(1, 64, 8, 8), (1, 128, 4, 4)]
    again = build_model(section, classes, DATA, 0)
    assert torch.equal(network.network.fc.weight, again.network.fc.weight)
    with pytest.raises(UserError, match="no weights 'DEFAULT' of resnet10; torchvision has none; or give a .safetensors"):
        build_model(section.model_copy(update={"weights": "DEFAULT"}), classes, DATA, 0)


def test_given_weights_begin_both_branches_and_drawn_ones_differ(tmp_path):
    from torchvision.models import resnet18

    whole = resnet18(num_classes=5)
    source = whole.layer4[1].state_dict()
    save_file(whole.state_dict(), tmp_path / "weights.safetensors")
    network = torchvision_model(branches=2, weights=str(tmp_path / "weights.safetensors")).network
    for branch in network.branches:
        assert all(torch.equal(value, source[name]) for name, value in branch.state_dict().items())
    assert torch.equal(network.shared.layer4[0].conv1.weight, whole.layer4[0].conv1.weight)
    assert network.fc.in_features == 1024, "a classifier of both, so a new one"
    first, second = network.branches
    assert not {value.data_ptr() for value in first.parameters()} & {value.data_ptr() for value in second.parameters()}
    drawn = torchvision_model(branches=2).network
    for layer in ("conv1", "conv2"):
        first, second = (branch.get_submodule(layer).weight for branch in drawn.branches)
        assert not torch.equal(first, second) and second.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.02)


def test_a_network_without_a_linear_last_layer_is_refused_where_its_feature_is_needed():
    plain = schema.TorchvisionModel(name="torchvision", architecture="squeezenet1_1")
    told = "^a SqueezeNet has no linear last layer, whose input is its feature; choose another architecture$"
    for values in {"projection": 8}, {"cosine_scale": 20.0}, {"weights": "weights.pth"}:
        with pytest.raises(UserError, match=told):
            build_model(plain.model_copy(update=values), 5, DATA, 0)
    network = build_model(plain, 5, DATA, 0)
    assert network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 5)
    with pytest.raises(UserError, match=told):
        classifier(network)


def test_two_branches_are_a_resnets():
    section = schema.TorchvisionModel(name="torchvision", architecture="resnet10", branches=2)
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert build_model(section, 7, DATA, 0)(images).shape == (2, 7), "whose last stage is one block"
    for architecture in ("mobilenet_v2", "regnet_x_400mf"):
        other = section.model_copy(update={"architecture": architecture})
        with pytest.raises(UserError, match=f"ResNet twice, which {architecture} is not; choose a resnet, or leave .* bbn$"):
            build_model(other, 5, DATA, 0)


def test_an_unknown_architecture_and_weights_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(UserError, match="torchvision has no classifier 'resnet19'; did you mean 'resnet1"):
        build_model(schema.TorchvisionModel(name="torchvision", architecture="resnet19"), 5, DATA, 0)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="do not fit resnet18: conv1.weight"):
        torchvision_model(weights=str(tmp_path / "weights.safetensors"))
    with pytest.raises(UserError, match=r"cannot load weights .*nothing.pth \(there is no such file\); give a .safetensors"):
        torchvision_model(weights=str(tmp_path / "nothing.pth"))
    for content, found in (b"", "EOFError"), (b"junk", "error"):
        (tmp_path / "bad.pth").write_bytes(content)
        with pytest.raises(UserError, match=f"cannot load weights .*bad.pth .{found}: .*; give a .safetensors or"):
            torchvision_model(weights=str(tmp_path / "bad.pth"))


def test_a_download_that_fails_is_one_line(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    for name in "DEFAULT", "IMAGENET1K_V1":
        with pytest.raises(UserError, match=f"cannot load weights {name} of resnet18 .URLError: .*no route"):
            torchvision_model(weights=name)
    with pytest.raises(UserError, match="no weights 'IMAGENET_V1' of resnet18; IMAGENET1K_V1, DEFAULT are torchvision's; or"):
        torchvision_model(weights="IMAGENET_V1")


def test_a_layer_that_is_missing_is_not_excused_by_its_width(tmp_path):
    from torchvision.models import resnet18

    state = {name: value for name, value in resnet18(num_classes=512).state_dict().items() if "layer4.1.conv1" not in name}
    save_file(state, tmp_path / "weights.safetensors")
    section = schema.TorchvisionModel(
        name="torchvision", architecture="resnet18", weights=str(tmp_path / "weights.safetensors")
    )
    with pytest.raises(UserError, match="do not fit resnet18: layer4.1.conv1.weight"):
        build_model(section, 512, DATA, 0)


def test_weights_that_are_code_are_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"conv1.weight": Trap()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="do not fit resnet18: conv1.weight"):
        torchvision_model(weights=str(tmp_path / "weights.pth"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.cuda
def test_a_forward_pass_on_a_cuda_device_is_the_cpus_within_rounding():
    network = build().eval()
    images = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        torch.testing.assert_close(network.cuda()(images.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)
