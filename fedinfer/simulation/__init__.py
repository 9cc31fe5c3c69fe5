"""Many devices on one machine, behind Flower's own API."""

from fedinfer.simulation.engines import CohortSum
from fedinfer.simulation.grid import InProcessGrid, SimulatedGrid, run_in_process
from fedinfer.simulation.run import SimulationResult, simulate

__all__ = ["CohortSum", "InProcessGrid", "SimulatedGrid", "SimulationResult", "run_in_process", "simulate"]
