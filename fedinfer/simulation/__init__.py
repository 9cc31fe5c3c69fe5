"""Many devices on one machine, behind Flower's own API."""

from fedinfer.simulation.availability import Always, OnOff, Periodic, RecordedTrace
from fedinfer.simulation.buffered import BufferedStep, FedBuff
from fedinfer.simulation.clock import Wait
from fedinfer.simulation.engines import CohortSum
from fedinfer.simulation.grid import InProcessGrid, SimulatedGrid, run_in_process
from fedinfer.simulation.populated import PopulatedGrid
from fedinfer.simulation.population import LogNormalSeconds, Population, SameSeconds
from fedinfer.simulation.run import SimulationResult, simulate
from fedinfer.simulation.scaffold import ScaffoldStrategy, ServerControl

__all__ = [
    "Always",
    "BufferedStep",
    "CohortSum",
    "FedBuff",
    "InProcessGrid",
    "LogNormalSeconds",
    "OnOff",
    "Periodic",
    "PopulatedGrid",
    "Population",
    "RecordedTrace",
    "SameSeconds",
    "ScaffoldStrategy",
    "ServerControl",
    "SimulatedGrid",
    "SimulationResult",
    "Wait",
    "run_in_process",
    "simulate",
]
