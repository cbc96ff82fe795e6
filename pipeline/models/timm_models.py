"""timm's classifiers by name, from scratch, from a file or from timm's own weights."""

import difflib

from torch import nn

from offline_bkd.pipeline import UserError
from offline_bkd.pipeline.models.weights import given_weights
from offline_bkd.pipeline.schema import TimmModel

try:
    import timm
except ImportError:
    raise UserError('model.name timm needs the package timm; run: pip install ".[timm]"')


def build_timm(section: TimmModel, classes: int, image_size: tuple[int, int] | None) -> nn.Module:
    """The network of `section`, for images of `image_size` (height, width); given weights load into every part but a last
    layer of another width, as timm adapts them to another input size.

    Raises UserError for a name that timm does not know, for settings and images that the architecture does not take, and
    for weights that cannot be read or do not fit.
    """
    _refuse_unknown(section)
    given = {"img_size": section.input_size, "patch_size": section.patch_size, "drop_path_rate": section.drop_path}
    options = {"num_classes": classes, **{name: value for name, value in given.items() if value is not None}}
    network = _create(section, options)
    last = network.get_classifier()
    if not isinstance(last, nn.Linear):
        raise UserError(
            f"the classifier of timm's {section.architecture} is a {type(last).__name__}, not one linear layer, whose input "
            "is the network's feature; choose another architecture"
        )
    _refuse_size(network, section, image_size)
    if section.weights is None:
        return network
    if section.downloads:
        refuse_unknown_timm_weights(section)
        return _create(section, options, pretrained=True)
    name = next(name for name, module in network.named_modules() if module is last)
    state = given_weights(section, network, name)
    for key, value in last.state_dict(prefix=f"{name}.").items():
        if key not in state or state[key].shape != value.shape:  # timm itself would accept any tensors without a last layer
            state[key] = value
    return _create(section, options, pretrained=True, pretrained_cfg_overlay={"state_dict": state, "num_classes": classes})


def refuse_unknown_timm_weights(section: TimmModel) -> None:
    """Raises UserError if timm has no weights of that name. Downloads nothing."""
    _refuse_unknown(section)
    own = timm.get_pretrained_cfg(section.architecture)
    if section.weights != "DEFAULT" or own is None or not own.has_weights:
        there = "timm's own are DEFAULT" if own and own.has_weights else "timm has none"
        raise UserError(
            f"there are no weights {section.weights!r} of {section.architecture}; {there}; or give a .safetensors or .pth file"
        )


def _create(section: TimmModel, options: dict[str, int | float], **weights) -> nn.Module:
    try:
        return timm.create_model(section.architecture, **options, **weights)
    except Exception as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())
        if weights:
            raise UserError(f"cannot load weights {section.weights} into timm's {section.architecture} ({found[:400]})")
        raise UserError(
            f"timm's {section.architecture} does not take these settings ({found}); change or leave out input_size, "
            "patch_size and drop_path"
        )


def _refuse_unknown(section: TimmModel) -> None:
    name, _, tag = section.architecture.partition(".")
    known = timm.list_models()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3) or ["convnext_atto"]
        raise UserError(f"timm has no classifier {name!r}; did you mean {' or '.join(map(repr, near))}?")
    tags = [other.partition(".")[2] for other in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise UserError(f"timm's {name} has no tag {tag!r}; it has {', '.join(tags) or 'none'}")


def _refuse_size(network: nn.Module, section: TimmModel, image_size: tuple[int, int] | None) -> None:
    own = network.pretrained_cfg
    side = section.input_size or own["input_size"][-1]
    if image_size and own.get("fixed_input_size") and tuple(image_size) != (side, side):
        found = " x ".join(map(str, image_size))
        raise UserError(
            f"timm's {section.architecture} takes images of {side} x {side} pixels, the views give {found}; set the model's "
            f"input_size={image_size[0]}, or views of {side}"
        )
