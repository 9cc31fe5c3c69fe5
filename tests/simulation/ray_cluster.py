"""A Ray cluster of two nodes, named by RAY_ADDRESS as a real one is; one of them is lost in the middle of a round.

`python -m tests.simulation.ray_cluster FOLDER` prints where shares of a cohort ran, and the sums before and after.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from torch import Tensor

from tests.simulation.test_ray_engine import sums
from tests.simulation.test_simulate import load, task_of


def main(folder: Path) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    # A lost node is noticed in seconds; Ray's own patience is half a minute.
    watch = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": watch}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = cluster.address
    second_id = second.node_id
    mark, lost = folder / "working", folder / "lost"

    def told(partition: int, partitions: int) -> tuple[Tensor, Tensor]:
        node = ray.get_runtime_context().get_node_id()
        (folder / f"node-{node}").touch()
        if node == second_id and lost.exists():
            mark.touch()
            time.sleep(600.0)
        return load(partition, partitions)

    def lose() -> None:
        while not mark.exists():
            time.sleep(0.05)
        cluster.remove_node(second, allow_graceful=False)

    whole = sums(task_of(), "ray", told)
    nodes = sum(path.name.startswith("node-") for path in folder.iterdir())
    lost.touch()
    threading.Thread(target=lose, daemon=True).start()
    broken = sums(task_of(), "ray", told)
    kept = [[total.weight, total.replies, len(total.errors)] for total in (*whole, *broken)]
    print(json.dumps({"nodes": nodes, "lost": mark.exists(), "sums": kept}))
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
