"""One call for a whole simulation, whatever runs the clients.

A simulation of a `LocalTask` is exact: given a seed, each backend draws the same rows and the same noise for a client.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import Tensor

from fedinfer.errors import BadUsage
from fedinfer.local_app import ARRAYS, SEED_KEY, LocalApp
from fedinfer.privacy import PrivacyPlan
from fedinfer.simulation.callbacks import Callback
from fedinfer.simulation.engines import Engine, OneByOne
from fedinfer.simulation.flower_engine import run_by_flower
from fedinfer.simulation.grid import Config, SimulatedGrid, run_on
from fedinfer.simulation.meter import Meter, Metered
from fedinfer.simulation.populated import PopulatedGrid
from fedinfer.simulation.population import Population
from fedinfer.simulation.processes import Processes
from fedinfer.simulation.vectorised import Vectorised
from fedinfer.simulation.waves import Waves

Backend = Literal["vectorised", "process", "ray", "flower"]
DeviceName = Literal["cpu", "cuda"]
MEMORY_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """What is left of a simulation.

    `context` is the ServerApp's, with what its main function stored in `context.state`. `updates` counts the clients'
    answers to "train" messages that are not errors. `startup_s` ends with the first message that is sent; for Flower's
    own simulation, which starts its workers in the meantime, with the first reply. `seconds` is the rest. `void` says
    that randomness came from a seed: an ε that was claimed means nothing.
    """

    context: Context = field(repr=False)
    updates: int
    startup_s: float
    seconds: float
    void: bool

    @property
    def updates_per_s(self) -> float:
        return self.updates / self.seconds if self.seconds > 0.0 else 0.0


def simulate(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_clients: int,
    backend: Backend = "vectorised",
    seed: int | None = None,
    run_config: Config | None = None,
    workers: int | None = None,
    memory_bytes: int = MEMORY_BYTES,
    population: Population | None = None,
    device: DeviceName = "cpu",
    callbacks: Sequence[Callback] = (),
) -> SimulationResult:
    """Run `server_app` against `num_clients` nodes of `client_app`; node i has partition-id i.

    "vectorised" runs the ClientApp of a `LocalTask` as one program for whole cohorts, and any other one after another
    in this process; "process" uses a pool of `workers` processes; "ray" runs such programs on Ray workers, of the
    cluster that RAY_ADDRESS names if it is set; "flower" is Flower's own simulation, for comparison. With a `seed` the
    clients' randomness and the global generators of Python, NumPy and torch are repeatable. With a
    `population` nodes come and go, take their time on a virtual clock and fail (`populated.py`): the ServerApp's grid
    is a `PopulatedGrid`. A LocalTask's clients compute on `device`; weights and rows come and go on the CPU, and so
    does all noise. `callbacks` are told what the grid sees of each wave of training messages under any ServerApp.

    Guarantees: for a LocalTask and a seed every backend gives each client the same rows and noise, and the same
    answer up to rounding; "vectorised" and "process" give the same bits at each run on the same machine, however many
    `workers` there are.
    Raises: BadUsage for an argument that cannot be; what the ServerApp raises.
    """
    if type(num_clients) is not int or num_clients < 1:
        raise BadUsage(f"clients: got {num_clients}, expected a whole number of at least 1")
    if population is not None and backend == "flower":
        raise BadUsage("population: got one for Flower's own simulation, which has none; expected another backend")
    _check_device(device, client_app, backend)
    seeded: Mapping[str, int] = {SEED_KEY: seed} if seed is not None and isinstance(client_app, LocalApp) else {}
    meter, waves = Meter(), Waves(callbacks)
    with repeatable(seed), closing_waves(waves):
        if backend == "flower":
            context = run_by_flower(
                server_app,
                client_app,
                nodes=num_clients,
                node_config=seeded,
                run_config=run_config or {},
                meter=meter,
                waves=waves,
            )
        else:
            engine = _engine(client_app, backend, workers, memory_bytes, torch.device(device))
            try:
                grid = _grid(
                    Metered(engine, meter),
                    population=population,
                    plan=client_app.task.plan if isinstance(client_app, LocalApp) else None,
                    nodes=num_clients,
                    configure=lambda index: {"partition-id": index, "num-partitions": num_clients, **seeded},
                    run_config=run_config or {},
                    waves=waves,
                )
                context = run_on(server_app, grid, run_config or {}, node_config=seeded)
            finally:
                engine.close()
    return SimulationResult(
        context=context,
        updates=meter.updates,
        startup_s=meter.startup_s,
        seconds=time.monotonic() - meter.started,
        void=seed is not None,
    )


def weights_after(result: SimulationResult) -> dict[str, Tensor]:
    """The `state_dict` that a ServerApp left as "arrays" in its Context, as `federation` does.

    Raises: BadUsage if it left none.
    """
    record = result.context.state.get(ARRAYS)
    if not isinstance(record, ArrayRecord):
        raise BadUsage(f"simulation: got no ArrayRecord {ARRAYS!r} in context.state, expected the weights")
    return dict(record.to_torch_state_dict())


def _check_device(device: str, client_app: ClientApp, backend: str) -> None:
    if device not in ("cpu", "cuda"):
        raise BadUsage(f"device: got {device!r}, expected 'cpu' or 'cuda'")
    if device == "cpu":
        return
    if backend != "vectorised" or not isinstance(client_app, LocalApp):
        raise BadUsage(
            f"device: got {device!r} for what is not a LocalTask on backend 'vectorised', expected 'cpu'; a ClientApp "
            "of its own code says itself where it computes"
        )
    if not torch.cuda.is_available():
        raise BadUsage("device: got 'cuda', but torch finds no GPU on this machine; expected 'cpu'")


def _engine(
    client_app: ClientApp, backend: str, workers: int | None, memory_bytes: int, device: torch.device
) -> Engine:
    if backend == "vectorised":
        if isinstance(client_app, LocalApp):
            return Vectorised(client_app, memory_bytes=memory_bytes, workers=workers, device=device)
        return OneByOne(client_app)
    if backend == "process":
        return Processes(client_app, workers=workers)
    if backend == "ray":
        if not isinstance(client_app, LocalApp):
            raise BadUsage("backend 'ray': got a ClientApp of its own code, expected a LocalTask's; use 'flower'")
        # Ray is an extra that only this backend needs.
        from fedinfer.simulation.ray_engine import RayCohorts

        return RayCohorts(client_app, memory_bytes=memory_bytes, workers=workers)
    raise BadUsage(f"backend: got {backend!r}, expected 'vectorised', 'process', 'ray' or 'flower'")


def _grid(
    engine: Engine,
    *,
    population: Population | None,
    plan: PrivacyPlan | None,
    nodes: int,
    configure: Callable[[int], Config],
    run_config: Config,
    waves: Waves,
) -> SimulatedGrid:
    if population is None:
        return SimulatedGrid(engine, nodes=nodes, configure=configure, run_config=run_config, waves=waves)
    return PopulatedGrid(
        engine,
        population=population,
        plan=plan,
        nodes=nodes,
        configure=configure,
        run_config=run_config,
        waves=waves,
    )


@contextmanager
def closing_waves(waves: Waves) -> Iterator[None]:
    """Callbacks are told that the run begins and, however it goes, that it is over."""
    try:
        waves.begin()
        yield
    finally:
        waves.end()


@contextmanager
def repeatable(seed: int | None) -> Iterator[None]:
    """With a seed the global generators of Python, NumPy and torch begin there; afterwards they are as they were."""
    if seed is None:
        yield
        return
    python, numpy, own = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.random.set_rng_state(own)
