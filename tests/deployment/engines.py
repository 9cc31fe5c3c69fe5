"""Flower's two engines for tests: real processes on loopback ports of their own, and nothing left of them afterwards.

`superlink` starts one SuperLink and a SuperNode for each node configuration; `run_simulation` starts a SuperLink that
simulates the nodes with Ray. Both are asked through the `flwr` command, as an operator would. Every process inherits
a token in its environment, and cleaning up ends each session in which the token is found: Flower puts helpers in
sessions of their own, and Ray's processes outlive their parents.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Value = bool | int | float | str | Path
FlatConfig = Mapping[str, Value]

TOKEN = "FEDINFER_TEST_ENGINE"
CONNECTION = "loopback"
COMPLETED = "finished:completed"
START_TRIES = 3
START_S = 60.0
POLITE_S = 3.0
STOP_S = 10.0
TAIL_LINES = 40
LINK_READY = re.compile(r"Uvicorn running on http://")
NODE_READY = re.compile(r"SuperNode ID: (\d+)")
RUN_STARTED = re.compile(r"Successfully started run (\d+)")
PORT_TAKEN = "address already in use"
NOISE = re.compile(r"\[uvicorn\.access\]|Fleet\.|ControlServicer\.")
KEY = re.compile(r"[A-Za-z0-9_.-]+")
ANSI = re.compile(r"\x1b\[[0-9;]*m")

# A SuperNode without work and a ServerApp without replies look again after 3 s, which cannot be configured. Python
# imports `sitecustomize` at the start of every process, so this is where the wait is shortened; nothing else changes.
QUICK_POLLS = """\
import time
_sleep = time.sleep
time.sleep = lambda seconds: _sleep(0.1 if seconds == 3 else seconds)
"""


class EngineError(Exception):
    """An engine did not start, a run did not complete, or a process could not be stopped; the text ends in logs."""


@dataclass(frozen=True, kw_only=True)
class CompletedRun:
    """What is known of a run that has ended; `logs` is what the ServerApp wrote."""

    run_id: int
    status: str
    details: str
    seconds: float
    logs: str = field(repr=False)


class RunFailed(EngineError):
    """A run ended in another way than completed; `run` is what is known of it."""

    def __init__(self, run: CompletedRun, tails: str) -> None:
        super().__init__(f"run: got {run.status!r} ({run.details}), expected {COMPLETED!r}{tails}")
        self.run = run


def quote(config: FlatConfig) -> str:
    """The `key=value key=value` form that `--run-config` and `--node-config` take.

    Raises: ValueError for a key or a string that Flower's parser cannot be given; it drops what it cannot read.

    >>> quote({"data": Path("/a b/rows.csv"), "rounds": 2, "resume": True})
    "data='/a b/rows.csv' rounds=2 resume=true"
    """
    for key in config:
        if not KEY.fullmatch(key):
            raise ValueError(f"configuration key: got {key!r}, expected letters, digits, hyphens and dots")
    return " ".join(f"{key}={_quoted(value)}" for key, value in config.items())


def _quoted(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    if "'" in text or "\n" in text:
        raise ValueError(f"configuration value: got {text!r}, expected no single quote and no line break")
    return f"'{text}'"


class Processes:
    """Programs of this Python's environment, each with a session, a folder and a Flower home of its own."""

    def __init__(self, root: Path, token: str, *, quick: bool) -> None:
        self._root = root
        self._token = token
        self._scripts = sysconfig.get_path("scripts")
        self._popens: dict[str, subprocess.Popen[bytes]] = {}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "RAY_", "PYTHON"))}
        self._environment = kept | {
            TOKEN: token,
            "PATH": self._scripts + os.pathsep + os.environ.get("PATH", os.defpath),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05" if quick else "1.0",
            "RAY_TMPDIR": str(root),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_DEDUP_LOGS": "0",
            "RAY_COLOR_PREFIX": "0",
        }
        if quick:
            shim = root / "quick-polls"
            shim.mkdir()
            (shim / "sitecustomize.py").write_text(QUICK_POLLS, encoding="utf-8")
            self._environment["PYTHONPATH"] = str(shim)

    def connect(self, port: int) -> None:
        """Point the `flwr` command at the SuperLink on `port`."""
        home = self._root / "flwr.home"
        home.mkdir()
        config = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (home / "config.toml").write_text(config, encoding="utf-8")

    def log(self, name: str) -> str:
        """What the program called `name` and its helpers wrote since it was last started, without colours."""
        return ANSI.sub("", (self._root / f"{name}.log").read_text(encoding="utf-8", errors="replace"))

    def tails(self) -> str:
        """The end of every log, for the message of an error."""
        parts = []
        for name, popen in self._popens.items():
            if name == "flwr-list" and popen.returncode == 0:
                continue
            lines = [line for line in self.log(name).splitlines() if not NOISE.search(line)]
            parts.append("\n".join([f"\n--- {name}: the last {TAIL_LINES} lines ---", *lines[-TAIL_LINES:]]))
        return "".join(parts)

    def serve(self, program: str, *arguments: str, name: str, ready: re.Pattern[str]) -> tuple[int, re.Match[str]]:
        """Start a server on a free port and wait until its own log says that it is ready; the port and the match.

        Raises: EngineError if it ends instead, or is not ready in time.
        """
        for _ in range(START_TRIES):
            port = _free_port()
            popen = self._start(program, *arguments, "--port", str(port), name=name)
            deadline = time.monotonic() + START_S
            while (match := ready.search(self.log(name))) is None and popen.poll() is None:
                if time.monotonic() > deadline:
                    raise EngineError(f"{name}: got no {ready.pattern!r} in its log within {START_S:g} s{self.tails()}")
                time.sleep(0.02)
            if match is not None:
                return port, match
            if PORT_TAKEN not in self.log(name):
                break
        raise EngineError(f"{name}: got exit status {popen.returncode} while it started{self.tails()}")

    def flwr(self, command: str, *arguments: str, timeout_s: float) -> str:
        """Run a `flwr` command to its end and return what it wrote.

        Raises: EngineError if it exits with an error, or is not done in time.
        """
        popen = self._start("flwr", command, *arguments, name=f"flwr-{command}", home="flwr")
        try:
            status = popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise EngineError(f"flwr {command}: not done within {timeout_s:g} s{self.tails()}") from None
        finally:
            popen.kill()
            popen.wait()
        if status != 0:
            raise EngineError(f"flwr {command}: got exit status {status}, expected 0{self.tails()}")
        return self.log(f"flwr-{command}")

    def stop(self, name: str, *, how: signal.Signals) -> None:
        """End one server by a signal and wait until it is gone; its helpers follow within a second or two.

        Raises: EngineError if it does not end.
        """
        popen = self._popens[name]
        popen.send_signal(how)
        try:
            popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise EngineError(f"{name}: still alive {STOP_S:g} s after {how.name}{self.tails()}") from None

    def stop_all(self) -> None:
        """End every process that came of these programs: politely for a while, then by force.

        Guarantees: on Linux none is left, whatever session or parent it has by now.
        Raises: EngineError if one cannot be ended.
        """
        for popen in self._popens.values():
            popen.terminate()
        # The helpers end by themselves as soon as the servers are not only dead but collected.
        deadline = time.monotonic() + POLITE_S
        for popen in self._popens.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                popen.wait(max(0.0, deadline - time.monotonic()))
        _end_all(self._token, polite_s=POLITE_S / 2)
        for popen in self._popens.values():
            popen.kill()
            popen.wait()

    def _start(self, program: str, *arguments: str, name: str, home: str = "") -> subprocess.Popen[bytes]:
        folder = self._root / name
        folder.mkdir(exist_ok=True)
        with (self._root / f"{name}.log").open("wb") as log:
            popen = subprocess.Popen(
                [str(Path(self._scripts) / program), *arguments],
                cwd=folder,
                env=self._environment | {"FLWR_HOME": str(self._root / f"{home or name}.home")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._popens[name] = popen
        return popen


class SuperLink:
    """A running SuperLink with its nodes; `node_ids[k]` is what Flower calls the node of the k-th configuration."""

    def __init__(self, processes: Processes, *, simulated: bool) -> None:
        self._processes = processes
        self._node_configs: list[FlatConfig] = []
        self.node_ids: list[int] = []
        options = ["--insecure", "--disable-runtime-dependency-installation"]
        if simulated:
            options.append("--simulation")
        port, _ = processes.serve("flower-superlink", *options, name="superlink", ready=LINK_READY)
        processes.connect(port)
        self._address = f"127.0.0.1:{port}"

    def add_node(self, config: FlatConfig) -> int:
        """Start a SuperNode and wait until the SuperLink knows it; its index."""
        self._node_configs.append(config)
        self.node_ids.append(0)
        index = len(self.node_ids) - 1
        self.start_node(index)
        return index

    def start_node(self, index: int) -> None:
        """Start the node of a configuration, anew if it was stopped: Flower then gives it another id."""
        options = ["--insecure", "--superlink", self._address]
        if config := self._node_configs[index]:
            options += ["--node-config", quote(config)]
        _, match = self._processes.serve("flower-supernode", *options, name=f"node-{index}", ready=NODE_READY)
        self.node_ids[index] = int(match[1])

    def stop_node(self, index: int, *, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop a node: SIGTERM lets it say goodbye to the SuperLink, SIGKILL is a crash."""
        self._processes.stop(f"node-{index}", how=how)

    def node_log(self, index: int) -> str:
        """What the SuperNode and its ClientApps wrote since it was last started."""
        return self._processes.log(f"node-{index}")

    def run(
        self,
        app_dir: Path,
        run_config: FlatConfig,
        *,
        timeout_s: float,
        federation_config: FlatConfig | None = None,
    ) -> CompletedRun:
        """Run the app in `app_dir` to its end, as `flwr run` does. Relative paths are relative to a folder that goes.

        Raises: RunFailed if it ended in another way than completed; EngineError if it did not end in time.
        """
        options = [str(app_dir), CONNECTION, "--stream"]
        if run_config:
            options += ["--run-config", quote(run_config)]
        if federation_config:
            options += ["--federation-config", quote(federation_config)]
        started = time.monotonic()
        logs = self._processes.flwr("run", *options, timeout_s=timeout_s)
        seconds = time.monotonic() - started
        if (match := RUN_STARTED.search(logs)) is None:
            raise EngineError(f"flwr run: got no run id{self._processes.tails()}")
        # `flwr run` exits with 0 for a run that failed, too: its status has to be asked for.
        answer = self._processes.flwr("list", CONNECTION, "--run-id", match[1], "--format", "json", timeout_s=START_S)
        (record,) = json.loads(answer)["runs"]
        run = CompletedRun(
            run_id=int(match[1]),
            status=record["status"],
            details=record["status-details"],
            seconds=seconds,
            logs=logs,
        )
        if run.status != COMPLETED:
            raise RunFailed(run, self._processes.tails())
        return run


@contextlib.contextmanager
def superlink(nodes: Sequence[FlatConfig], *, quick: bool = True) -> Iterator[SuperLink]:
    """A SuperLink with one SuperNode for each of `nodes`, all online; everything is stopped on the way out.

    `quick` shortens the waits between polls (see `QUICK_POLLS`); without it a round takes 3 to 6 s.
    Raises: EngineError if something does not start, or cannot be stopped.
    """
    with _processes(quick=quick) as processes:
        link = SuperLink(processes, simulated=False)
        for config in nodes:
            link.add_node(config)
        yield link


def run_simulation(app_dir: Path, *, num_nodes: int, run_config: FlatConfig, timeout_s: float) -> CompletedRun:
    """Run the app in `app_dir` on Flower's simulation engine: Ray, two processors, one for each client at a time.

    A simulated node has the configuration `partition-id=K num-partitions=N`.
    Raises: RunFailed if it ended in another way than completed; EngineError if it did not end in time.
    """
    federation: FlatConfig = {
        "num-supernodes": num_nodes,
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": 2,
        "init-args-logging-level": "error",
        "init-args-log-to-driver": True,
    }
    with _processes(quick=True) as processes:
        link = SuperLink(processes, simulated=True)
        return link.run(app_dir, run_config, timeout_s=timeout_s, federation_config=federation)


@contextlib.contextmanager
def _processes(*, quick: bool) -> Iterator[Processes]:
    # The name is short because Ray puts Unix sockets below it, whose paths may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="fi-", ignore_cleanup_errors=True) as folder:
        root, token = Path(folder), secrets.token_hex(16)
        processes = Processes(root, token, quick=quick)
        with _guard(token, root):
            try:
                yield processes
            finally:
                processes.stop_all()


@contextlib.contextmanager
def _guard(token: str, root: Path) -> Iterator[None]:
    """Another process that cleans up when this one is killed: the end of its standard input tells it."""
    command = [sys.executable, "-I", str(Path(__file__).resolve()), token, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.terminate()


def _clean_up_after_parent(token: str, root: Path) -> None:
    sys.stdin.read()
    _end_all(token, polite_s=0.0)
    shutil.rmtree(root, ignore_errors=True)


def _end_all(token: str, *, polite_s: float) -> None:
    """Wait for the end of every process of a session that has `token`; after `polite_s`, end them by force."""
    started = time.monotonic()
    sessions: set[int] = set()
    while left := _alive(sessions := sessions | _sessions_with(token)):
        late_s = time.monotonic() - started - polite_s
        if late_s > STOP_S:
            raise EngineError(f"stop: got processes {sorted(left)} still alive, expected none")
        if late_s >= 0.0:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _sessions_with(token: str) -> set[int]:
    """The sessions of the processes that carry `token` in their environment."""
    mark = f"{TOKEN}={token}".encode()
    sessions = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes():
                sessions.add(os.getsid(pid))
    return sessions - {os.getsid(0)}


def _alive(sessions: set[int]) -> set[int]:
    """The processes of `sessions`, but for those that ended and wait to be collected."""
    alive = set()
    for pid in _pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) in sessions and Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
                alive.add(pid)
    return alive


def _pids() -> list[int]:
    proc = Path("/proc")
    return [int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()] if proc.is_dir() else []


if __name__ == "__main__":
    _clean_up_after_parent(sys.argv[1], Path(sys.argv[2]))
