"""Networks: uint8 images in, logits out, normalisation inside, so that a checkpoint is whole."""

from offline_bkd.pipeline.models.build import build_model, head_parts, memory, new_parts, refuse_unknown_weights
from offline_bkd.pipeline.models.heads import classifier, classifier_name
from offline_bkd.pipeline.models.image_classifier import ImageClassifier

__all__ = [
    "ImageClassifier",
    "build_model",
    "classifier",
    "classifier_name",
    "head_parts",
    "memory",
    "new_parts",
    "refuse_unknown_weights",
]
