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
PerChannel = tuple[float, float, float]
PositivePerChannel = tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
