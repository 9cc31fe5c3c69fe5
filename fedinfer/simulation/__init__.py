"""Many devices on one machine, behind Flower's own API."""

from fedinfer.simulation.availability import Always, OnOff, Periodic, RecordedTrace
from fedinfer.simulation.buffered import BufferedStep, FedBuff
from fedinfer.simulation.callbacks import Callback, RoundLog
from fedinfer.simulation.clock import Wait
from fedinfer.simulation.engines import CohortSum
from fedinfer.simulation.federation import federation
from fedinfer.simulation.grid import InProcessGrid, SimulatedGrid, run_in_process
from fedinfer.simulation.logs import CsvLog, JsonLines, ProgressBar, TensorBoard
from fedinfer.simulation.loop_state import Checkpoint
from fedinfer.simulation.populated import PopulatedGrid
from fedinfer.simulation.population import LogNormalSeconds, Population, SameSeconds
from fedinfer.simulation.run import SimulationResult, simulate, weights_after
from fedinfer.simulation.scaffold import ScaffoldStrategy, ServerControl

__all__ = [
    "Always",
    "BufferedStep",
    "Callback",
    "Checkpoint",
    "CohortSum",
    "CsvLog",
    "FedBuff",
    "InProcessGrid",
    "JsonLines",
    "LogNormalSeconds",
    "OnOff",
    "Periodic",
    "PopulatedGrid",
    "Population",
    "ProgressBar",
    "RecordedTrace",
    "RoundLog",
    "SameSeconds",
    "ScaffoldStrategy",
    "ServerControl",
    "SimulatedGrid",
    "SimulationResult",
    "TensorBoard",
    "Wait",
    "federation",
    "run_in_process",
    "simulate",
    "weights_after",
]
