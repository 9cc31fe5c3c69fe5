"""The local pipeline: features -> logit -> probability -> label and confidence. No network, no rows kept."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from fedinfer.errors import NonFinite, ShapeMismatch
from fedinfer.models import Model

Floats = NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is told of one row: the label and the probability that the model gives to it."""

    label: str
    confidence: float


def answers(probabilities: Floats, *, threshold: float, labels: tuple[str, str]) -> list[Answer]:
    """Post-processing: probabilities (n,) of the positive label to labelled answers.

    The threshold is public and fixed before training; choosing it on private rows would be a release.
    """
    return [
        Answer(label=labels[int(p >= threshold)], confidence=float(p if p >= threshold else 1.0 - p))
        for p in probabilities
    ]


class Pipeline:
    """A `Predictor` over one saved model."""

    def __init__(self, model: Model) -> None:
        self._net = model.module()
        self._inputs = model.spec.inputs
        self._threshold = model.threshold
        self._labels = model.labels

    def logits(self, features: Floats) -> NDArray[np.float64]:
        """Logits (n,) of features (n, d).

        Raises: ShapeMismatch for another width; NonFinite for NaN or infinity in the features.
        """
        if features.ndim != 2 or features.shape[1] != self._inputs:
            raise ShapeMismatch(got=features.shape, expected=f"(n, {self._inputs})", what="features")
        if not np.isfinite(features).all():
            raise NonFinite("features: got NaN or infinity, expected finite numbers")
        with torch.inference_mode():
            output = self._net(torch.from_numpy(np.ascontiguousarray(features, np.float32)))
        return np.asarray(output[:, 0].numpy(), np.float64)

    def predict(self, features: Floats) -> NDArray[np.float64]:
        """Probabilities (n, 2) of the negative and the positive label."""
        positive = expit(self.logits(features))
        return np.stack([1.0 - positive, positive], axis=1)

    def answer(self, features: Floats) -> list[Answer]:
        """A label and its confidence for each row."""
        return answers(self.predict(features)[:, 1], threshold=self._threshold, labels=self._labels)
