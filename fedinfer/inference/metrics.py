"""Raw metrics of rows. Each is a release of the rows that it was computed on, and without noise an unsafe one."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def unsafe_auc(labels: Floats, scores: Floats) -> float | None:
    """Area under the ROC curve, or None where all labels are the same (then it is not defined)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, scores)) if 0.0 < labels.mean() < 1.0 else None


def unsafe_accuracy(labels: Floats, probabilities: Floats, *, threshold: float) -> float:
    """Share of rows whose label is on the side of the threshold that the probability is on."""
    return float(((probabilities >= threshold) == (labels > 0.5)).mean())
