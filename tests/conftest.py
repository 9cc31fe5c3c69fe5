"""What every test needs: no telemetry, one thread, folders of its own."""

import os
import tempfile

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_HOME"] = tempfile.mkdtemp(prefix="fedinfer-flwr-")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("fedinfer", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedinfer")
