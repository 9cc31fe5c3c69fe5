"""`fedinfer simulate`: a TOML file is a whole run; weights, logs and a plot come out."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save as to_bytes

from fedinfer.cli.console import note, show_json
from fedinfer.cli.console import out as screen
from fedinfer.cli.simulation_file import Output, Simulation, read_simulation
from fedinfer.cli.simulation_parts import Measure, model_of, rows_of, task_of
from fedinfer.cli.stopping import stop_between_steps
from fedinfer.errors import BadInput, BadUsage
from fedinfer.files import replace_file
from fedinfer.privacy import PrivacyPlan
from fedinfer.simulation import (
    Callback,
    Checkpoint,
    CsvLog,
    JsonLines,
    ProgressBar,
    RoundLog,
    SimulationResult,
    TensorBoard,
    federation,
    simulate,
    weights_after,
)
from fedinfer.simulation.run import Backend, DeviceName

KEY = "fedinfer-simulation-result"


class Watch:
    """Knows how many rounds are done, and stops between two of them where `check` raises."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self.done = 0

    def begin(self, done: int) -> None:
        self.done = done

    def round(self, record: RoundLog) -> None:
        self.done = record.round
        self._check()

    def end(self) -> None: ...


def run_simulation(path: Path, *, resume: bool, as_json: bool) -> None:
    """Check everything first, then run; a refusal leaves files as they were."""
    config = read_simulation(path)
    rows = rows_of(config.data)
    net = model_of(config.model, rows)
    task = task_of(config, net, rows)
    load = config.partition.divide(rows.y.numpy(), config.clients).load(rows.x, rows.y)
    measure = Measure(model=model_of(config.model, rows), x=rows.test_x, y=rows.test_y) if len(rows.test_y) else None
    logs = _logs(config.output)
    checkpoint = config.output.weights.with_name(config.output.weights.name + ".checkpoint")
    _check_places(config.output)
    with stop_between_steps() as check:
        watch = Watch(check)
        app = federation(
            task,
            rounds=config.rounds,
            cohort=config.cohort,
            rule=config.rule,
            evaluate=measure,
            evaluate_every=config.evaluate_every,
            callbacks=[*logs, ProgressBar(config.rounds), watch],
            checkpoint=Checkpoint(path=checkpoint, every=config.output.checkpoint_every, resume=resume),
        )
        try:
            result = simulate(
                app,
                task.client_app(load),
                num_clients=config.clients,
                backend=cast(Backend, config.backend),
                seed=config.seed,
                workers=config.workers,
                device=cast(DeviceName, config.device),
            )
        except KeyboardInterrupt:
            if watch.done:
                note(
                    f"stopped; {checkpoint} holds round {watch.done} of {config.rounds}: the same with --resume goes on"
                )
            else:
                note("stopped before the first round was over")
            raise
    summary = _finish(config, result, task.plan, measure)
    if as_json:
        show_json(summary)
    else:
        screen.print(_sentence(summary))


def _logs(output: Output) -> list[Callback]:
    if output.plot is not None:
        try:
            import matplotlib  # noqa: F401 (drawn with after the run)
        except ImportError:
            raise BadUsage("plot: got no package matplotlib; pip install matplotlib, or leave plot out") from None
    logs: list[Callback] = []
    if output.csv is not None:
        logs.append(CsvLog(output.csv))
    if output.json_lines is not None:
        logs.append(JsonLines(output.json_lines))
    if output.tensorboard is not None:
        logs.append(TensorBoard(output.tensorboard))
    return logs


def _check_places(output: Output) -> None:
    """Make the folders that files go to: one that cannot be made must fail before a long run, not after."""
    for file in (output.weights, output.csv, output.json_lines, output.plot):
        if file is not None:
            if file.is_dir():
                raise BadInput(f"output {file}: got a folder, expected a file")
            file.parent.mkdir(parents=True, exist_ok=True)


def _finish(
    config: Simulation, result: SimulationResult, plan: PrivacyPlan | None, measure: Measure | None
) -> Mapping[str, Any]:
    """Write the weights, with the summary in their header, and the plot; the summary."""
    weights = weights_after(result)
    protected = plan is not None and not result.void
    summary: dict[str, Any] = {
        "weights": str(config.output.weights),
        "clients": config.clients,
        "rounds": config.rounds,
        "seed": config.seed,
        "metrics": {} if measure is None else dict(measure(weights)),
        "epsilon": plan.epsilon() if plan is not None and protected else None,
        "delta": plan.delta if plan is not None and protected else None,
        "unit": None if plan is None else plan.unit,
        "adversary": None if plan is None else plan.adversary,
        "epsilon_void": not protected,
        "updates": result.updates,
        "seconds": result.seconds,
        "updates_per_s": result.updates_per_s,
    }
    lasting = {name: value for name, value in summary.items() if not name.startswith(("updates", "seconds"))}
    tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
    replace_file(config.output.weights, to_bytes(tensors, metadata={KEY: json.dumps(lasting, sort_keys=True)}))
    if config.output.plot is not None and config.output.json_lines is not None:
        _draw(config.output.json_lines, config.output.plot)
    return summary


def _sentence(summary: Mapping[str, Any]) -> str:
    shown = "".join(f", {name.replace('_', ' ')} {value:.4g}" for name, value in summary["metrics"].items())
    if summary["unit"] is None:
        promise = "no privacy plan"
    elif summary["epsilon_void"]:
        promise = "ε is void, because of the seed"
    else:
        promise = (
            f"ε = {summary['epsilon']:.4g} at δ = {summary['delta']:g} for each {summary['unit']} "
            f"against the {summary['adversary']}"
        )
    return (
        f"{summary['weights']}: {summary['rounds']} rounds over {summary['clients']} clients{shown}; {promise}; "
        f"{summary['updates_per_s']:,.0f} updates/s"
    )


def _draw(log: Path, path: Path) -> None:
    """Training loss and metrics by round, whole or not at all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    names = [name for name in ("accuracy", "test_loss", "loss") if any(r.get(name) is not None for r in records)]
    figure, panels = pyplot.subplots(1, max(1, len(names)), figsize=(4 * max(1, len(names)), 3.2), squeeze=False)
    for name, axes in zip(names, panels[0], strict=False):
        points = [(record["round"], record[name]) for record in records if record.get(name) is not None]
        axes.plot(*zip(*points, strict=True))
        axes.set(xlabel="round", title={"loss": "training loss"}.get(name, name.replace("_", " ")))
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format=path.suffix.lstrip("."))
    pyplot.close(figure)
    replace_file(path, buffer.getvalue())
