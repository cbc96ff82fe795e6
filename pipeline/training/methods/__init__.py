"""Methods: for each kind of schema.AnyMethod, what a step runs, which rows an epoch visits and what is minimised.

A new method is a section in schema/methods.py, a class here (contract.Method says what of) and a line in BY_NAME; its formula,
if it has a new one, is a pure function in losses.py.
"""

from torch import nn

from offline_bkd.pipeline.schema import MethodSection
from offline_bkd.pipeline.training.methods.bbn import BilateralBranches
from offline_bkd.pipeline.training.methods.contract import Context, Method, StepLoss
from offline_bkd.pipeline.training.methods.crt import ClassifierRetraining
from offline_bkd.pipeline.training.methods.distillation import BalancedDistillation, ClassBalancedDistillation, Distillation
from offline_bkd.pipeline.training.methods.labels import (
    ClassBalanced,
    ClassBalancedFocal,
    CrossEntropy,
    Focal,
    LogitAdjustment,
    MarginWithDeferredWeights,
)
from offline_bkd.pipeline.training.methods.lfme import MultipleExperts
from offline_bkd.pipeline.training.methods.oltr import OpenLongTail

__all__ = ["Context", "Method", "StepLoss", "build_method", "freeze"]

BY_NAME = {
    "ce": CrossEntropy,
    "cb": ClassBalanced,
    "focal": Focal,
    "cb_focal": ClassBalancedFocal,
    "logit_adjustment": LogitAdjustment,
    "ldam": MarginWithDeferredWeights,
    "kd": Distillation,
    "bkd": BalancedDistillation,
    "cbd": ClassBalancedDistillation,
    "lfme": MultipleExperts,
    "crt": ClassifierRetraining,
    "oltr": OpenLongTail,
    "bbn": BilateralBranches,
}


def freeze(settings: MethodSection, model: nn.Module) -> nn.Module:
    """`model` as the method of `settings` trains it: what does not learn is frozen."""
    method = BY_NAME[settings.name]
    return method.freeze(settings, model) if hasattr(method, "freeze") else model


def build_method(settings: MethodSection, context: Context) -> Method:
    """The method that `settings` describe, over `context`. Raises UserError where the two do not fit."""
    return BY_NAME[settings.name](settings, context)
