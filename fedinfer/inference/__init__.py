"""Local inference: features to labelled answers with a saved model."""

from fedinfer.inference.metrics import unsafe_accuracy, unsafe_auc
from fedinfer.inference.pipeline import Answer, Pipeline

__all__ = ["Answer", "Pipeline", "unsafe_accuracy", "unsafe_auc"]
