"""Model families: a table NAME -> builder, and how a model lies on disk."""

from fedinfer.models.families import FAMILIES, ModelSpec, build
from fedinfer.models.file import Model, load, save

__all__ = ["FAMILIES", "Model", "ModelSpec", "build", "load", "save"]
