"""A small wavelet scattering transform of images: features that nobody trained, so that they cost no privacy.

Order 0 is the blurred image, order 1 the blurred moduli of its Morlet wavelet coefficients, order 2 those of the
moduli at coarser scales. Convolutions are products of Fourier transforms on a mirrored border; images are small, so
nothing is subsampled before the last blur.

Reference: Bruna and Mallat 2013, arXiv:1203.1513; as features for private training: Tramèr and Boneh 2021,
arXiv:2011.11660.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedinfer.errors import BadUsage

Complexes = NDArray[np.complex128]
# Bandwidth and centre frequency of the finest wavelet, in pixels and radians.
SIGMA, FREQUENCY = 0.8, 3.0 * math.pi / 4.0
CHUNK = 256


def scatter(images: Tensor, *, scales: int, angles: int = 8) -> Tensor:
    """The coefficients (n, channels, h / 2^scales, w / 2^scales) of `images` (n, h, w).

    Channels: 1 + scales·angles + angles²·scales·(scales - 1) / 2.

    Guarantees: a row's coefficients depend on that row alone; a constant image has zeros beyond order 0.
    Raises: BadUsage unless both sides are divisible by 2^scales.
    Reference: Bruna and Mallat 2013, section 2.
    """
    height, width = images.shape[1:]
    step = 2**scales
    if scales < 1 or height % step or width % step:
        raise BadUsage(f"scattering: got images of {height} by {width}, expected sides divisible by {step}")
    size = (height + 2 * step, width + 2 * step)
    wavelets = [_fourier(size, scale, angle, angles) for scale in range(scales) for angle in range(angles)]
    blur = _fourier_blur(size, SIGMA * 2 ** (scales - 1))
    return torch.cat([_scatter(chunk, wavelets, blur, scales, angles) for chunk in torch.split(images, CHUNK)])


def _scatter(images: Tensor, wavelets: list[Tensor], blur: Tensor, scales: int, angles: int) -> Tensor:
    step = 2**scales
    padded = functional.pad(images[:, None], (step, step, step, step), mode="reflect")[:, 0]

    def blurred(spectrum: Tensor) -> Tensor:
        inside: Tensor = torch.fft.ifft2(spectrum * blur).real[:, step:-step:step, step:-step:step]
        return inside

    whole = torch.fft.fft2(padded)
    zeroth, first, second = [blurred(whole)], [], []
    for index, wavelet in enumerate(wavelets):
        modulus = torch.fft.fft2(torch.fft.ifft2(whole * wavelet).abs())
        first.append(blurred(modulus))
        # Coarser wavelets only: a modulus has next to nothing at scales finer than its own.
        later = wavelets[(index // angles + 1) * angles :]
        second += [blurred(torch.fft.fft2(torch.fft.ifft2(modulus * one).abs())) for one in later]
    return torch.stack(zeroth + first + second, dim=1)


def _gaussian(size: tuple[int, int], sigma: float, slant: float, angle: float, frequency: float) -> Complexes:
    """A periodic Gaussian, wider by 1 / `slant` across `angle`, times a wave along it; without it, of integral 1."""
    total = np.zeros(size, np.complex128)
    for wrap_y in (-1, 0, 1):
        for wrap_x in (-1, 0, 1):
            y = np.arange(size[0])[:, None] - size[0] * wrap_y - (size[0] // 2)
            x = np.arange(size[1])[None, :] - size[1] * wrap_x - (size[1] // 2)
            along = math.cos(angle) * x + math.sin(angle) * y
            across = math.cos(angle) * y - math.sin(angle) * x
            total += np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2) + 1j * frequency * along)
    return total * slant / (2 * math.pi * sigma**2)


def _fourier(size: tuple[int, int], scale: int, angle: int, angles: int) -> Tensor:
    """The Fourier transform of a Morlet wavelet: a wave under a Gaussian, less so much of it that its mean is zero."""
    direction, slant, sigma = math.pi * angle / angles, 4.0 / angles, SIGMA * 2**scale
    wave = _gaussian(size, sigma, slant, direction, FREQUENCY / 2**scale)
    envelope = _gaussian(size, sigma, slant, direction, 0.0)
    wavelet = wave - envelope * (wave.sum() / envelope.sum())
    return _centred(wavelet)


def _fourier_blur(size: tuple[int, int], sigma: float) -> Tensor:
    return _centred(_gaussian(size, sigma, 1.0, 0.0, 0.0))


def _centred(kernel: Complexes) -> Tensor:
    """The transform of a kernel whose middle is the middle of the picture; real, by the kernel's symmetry."""
    return torch.from_numpy(np.fft.fft2(np.fft.ifftshift(kernel)).real.astype(np.float32))
