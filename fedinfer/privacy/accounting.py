"""ε of Poisson-subsampled Gaussian steps, by privacy loss distributions (Google's dp-accounting).

Reference: Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022, arXiv:2207.04380 ("connect the dots": the
discretised distribution dominates the true one, so that the ε returned is an upper bound).
"""

from functools import lru_cache

from fedinfer.errors import BadUsage

# Halving it moves ε by less than 1e-4 for the plans in use (tests/privacy/test_plan_and_noise.py).
INTERVAL = 1e-3


@lru_cache(maxsize=1024)
def epsilon_of(*, noise_multiplier: float, sampling_rate: float, steps: int, delta: float) -> float:
    """ε at `delta` of `steps` Gaussian releases, each on a Poisson sample at `sampling_rate`.

    Guarantees: an upper bound under adding or removing one example; grows with `steps`, falls with the noise.
    """
    # The import takes half a second, and only the first use of a plan needs it.
    from dp_accounting.pld import privacy_loss_distribution

    if steps == 0:
        return 0.0
    step = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=INTERVAL, use_connect_dots=True
    )
    return float(step.self_compose(steps).get_epsilon_for_delta(delta))


@lru_cache(maxsize=256)
def noise_for(*, epsilon: float, sampling_rate: float, steps: int, delta: float) -> float:
    """The smallest noise multiplier with ε at most `epsilon`, met from below to 1e-4.

    Raises: BadUsage if no noise multiplier between 0.1 and 10,000 gives it.
    """

    def spent(noise: float) -> float:
        return epsilon_of(noise_multiplier=noise, sampling_rate=sampling_rate, steps=steps, delta=delta)

    high = 1.0
    while spent(high) > epsilon:
        high *= 2.0
        if high > 1e4:
            raise BadUsage(
                f"epsilon: got {epsilon:g}, too small for {steps} steps; use fewer rounds or a larger epsilon"
            )
    low = high / 2.0
    while spent(low) <= epsilon:
        high, low = low, low / 2.0
        if low < 0.1:
            raise BadUsage(f"epsilon: got {epsilon:g}, so large that it protects nothing; expected less")
    while epsilon - spent(high) > 1e-4 and high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if spent(middle) > epsilon else (low, middle)
    return high
