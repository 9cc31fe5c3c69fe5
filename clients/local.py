"""Prediction on the device: a saved model, rows of text in, labelled answers out. No network is touched."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedinfer.data import Row, Schema, encode, from_json
from fedinfer.errors import ModelFileError
from fedinfer.inference import Answer, Pipeline
from fedinfer.models import Model, load


@dataclass(frozen=True)
class LocalModel:
    """A model opened for prediction, with the public schema from its header."""

    model: Model
    schema: Schema
    pipeline: Pipeline

    @classmethod
    def open(cls, path: Path, *, schema: Schema | None = None) -> Self:
        """Load a model file; where `schema` is given, check that the model was trained with it.

        Raises: ModelFileError if the file is no model, its header does not hold, or it is for another schema.
        """
        model = load(path)
        own = from_json(model.schema)
        if own.digest() != model.schema_digest or own.width != model.spec.inputs:
            raise ModelFileError(f"model {path}: the schema in its header is not the one it was trained with")
        if schema is not None and schema.digest() != model.schema_digest:
            raise ModelFileError(
                f"model {path}: got a model for the schema {own.name!r}, expected {schema.name!r} as given; "
                "train a model for that schema"
            )
        return cls(model, own, Pipeline(model))

    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """A label and its confidence for each row.

        Raises: SchemaError for a value that the schema does not allow.
        """
        return self.pipeline.answer(encode(rows, self.schema, with_target=False).features)
