"""The settings of a training, under the name that scripts import them by."""

from archdsl.training.config import TrainConfig

__all__ = ["TrainConfig"]
