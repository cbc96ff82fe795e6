"""A run whose backbone another network takes: all of its weights but the classifier's (methods crt and oltr)."""

import torch

from offline_bkd.pipeline import UserError, runs
from offline_bkd.pipeline.data import datasets
from offline_bkd.pipeline.evaluate import load_model
from offline_bkd.pipeline.models import classifier_name, new_parts
from offline_bkd.pipeline.schema import Network


def take_backbone(model: torch.nn.Module, section: Network, run: runs.Run, training_set: datasets.Dataset) -> torch.nn.Module:
    """Gives `model`, which `section` describes, the last weights of `run`, all but those of its new parts.

    Returns the network that they are of, on the CPU. Raises UserError where they do not fit.
    """
    source, summary = run.config().network(run.stage), run.summary()
    if source.expert:
        raise UserError(f"the run in {run.folder} is an expert of {source.expert}-shot classes; name one of all classes")
    if summary["dataset"] != training_set.fingerprint or tuple(summary["classes"]) != training_set.classes:
        raise UserError(
            f"the network in {run.folder} was trained on other data than this {training_set.name}; use the same data"
        )
    if source.model.memory or source.model.branches > 1:
        raise UserError(
            f"the run in {run.folder} is of method {source.method.name}, whose network has parts that a backbone has not; "
            "name one of another method, such as a teacher's"
        )
    trained = load_model(run, "last", run.config(), len(training_set.classes))
    own, new = model.state_dict(), tuple(f"{name}." for name in new_parts(model, trained))
    last = f"{classifier_name(trained)}."
    kept = {name: value for name, value in trained.state_dict().items() if not name.startswith(last)}
    wanted = {name for name in own if not name.startswith(new)}
    if kept.keys() != wanted or any(value.shape != own[name].shape for name, value in kept.items()):
        changed = runs.difference(_backbone(source.model), _backbone(section))
        raise UserError(f"the backbone in {run.folder} is another network than the new one: {changed}; give the same model")
    model.load_state_dict({**own, **kept})
    return trained


def _backbone(section: Network) -> dict:
    """The settings of a network that say what its backbone is."""
    return section.model_dump(exclude={"cosine_scale", "cosine_init", "zero_init_residual", "memory", "branches", "weights"})
