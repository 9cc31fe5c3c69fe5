"""Many devices in one process, behind Flower's own API."""

from fedinfer.simulation.grid import InProcessGrid, run_in_process

__all__ = ["InProcessGrid", "run_in_process"]
