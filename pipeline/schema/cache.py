"""The section of the cache, and its encodings, by kind."""

from typing import Annotated, Literal

from pydantic import Field

from offline_bkd.pipeline.schema.base import Positive, Section, Temperature


class Logit(Section):
    """The logits over T less the largest of their row, float16: they serve other temperatures too."""

    name: Literal["logit"]


class Probability(Section):
    """The tempered probabilities themselves."""

    name: Literal["probability"]
    dtype: Literal["float16", "float32"] = "float16"  # 11 bits a probability in 2 bytes, or exact in 4


class Klt(Section):
    """Transform-coded log-probabilities, several times smaller."""

    name: Literal["klt"]
    max_error: Annotated[float, Field(gt=0, lt=1)] = 0.02  # mean total variation of the BKD target, held in every block


class CacheSection(Section):
    """What stage one writes."""

    temperature: Temperature = 2.0  # T of softmax(z / T), the answers that are stored
    encoding: Annotated[Logit | Probability | Klt, Field(discriminator="name")] = Logit(name="logit")  # how they are stored
    features: bool = False  # also each teacher's last feature, L2-normalised, 8 bits a number
    batch_size: Positive = 512  # images in a forward pass of the teacher; fewer take less memory, and may change the last bits
    precision: Literal["float32", "bfloat16"] = "float32"  # of the teacher's forward pass
