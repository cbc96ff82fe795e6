"""What every section of an experiment is, and the numbers that its keys may hold."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Positive = Annotated[int, Strict(), Field(gt=0)]
Temperature = Annotated[float, Field(ge=0.01, le=1000)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _share_of_epochs(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError(f"a share of the epochs, from 0 to below 1 (epoch 160 of 200 is 0.8); found {value:g}")
    return value


ShareOfEpochs = Annotated[float, AfterValidator(_share_of_epochs)]


def _pixels_to_one(values: tuple[float, float, float]) -> tuple[float, float, float]:
    if max(values) > 1:
        raise ValueError(f"of pixels in [0, 1], so at most 1; found {values}; divide what is of pixels up to 255 by 255")
    return values


Channel = Annotated[float, Field(ge=0)]
PositiveChannel = Annotated[float, Field(gt=0)]
PerChannel = Annotated[tuple[Channel, Channel, Channel], AfterValidator(_pixels_to_one)]
PositivePerChannel = Annotated[tuple[PositiveChannel, PositiveChannel, PositiveChannel], AfterValidator(_pixels_to_one)]
