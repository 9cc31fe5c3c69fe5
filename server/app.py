"""The Flower ServerApp: parse the settings once, run the rounds, keep a checkpoint, write the model."""

import json
import secrets
from dataclasses import asdict
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from fedinfer.arrays import unflatten
from fedinfer.auditing.trained import audit_training
from fedinfer.card import report_card
from fedinfer.data import to_json
from fedinfer.models import Model, build, load, save
from fedinfer.settings import RunConfig

from .checkpoint import load_checkpoint, save_checkpoint
from .evaluation import evaluate
from .histograms import histograms
from .rounds import RoundState, first_state, rounds

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train one model, or measure the one that `evaluate` names.

    In `context.state` are then "weights", "trajectory" (rounds + 1, d) and "result", or "evaluation" or "histograms".
    """
    config = RunConfig.from_flat(context.run_config)
    if config.evaluate:
        run = config.run or f"evaluation-{secrets.token_hex(4)}"
        result = evaluate(grid, config, load(Path(config.evaluate)), run)
        context.state["evaluation"] = ConfigRecord({"json": json.dumps(result)})
        return
    if config.histograms:
        result = histograms(grid, config, config.run or f"histograms-{secrets.token_hex(4)}")
        context.state["histograms"] = ConfigRecord({"json": json.dumps(result)})
        return
    checkpoint = Path(config.checkpoint) if config.checkpoint else None
    if config.resume and checkpoint is not None:
        start = load_checkpoint(checkpoint, config_digest=config.digest())
    else:
        start = first_state(config, config.run or secrets.token_hex(8))
        if checkpoint is not None:
            # From here on the file is this run's: one that stops in its first round goes on, and not as another.
            save_checkpoint(start, checkpoint, config_digest=config.digest())
    state = start
    trajectory = [start.weights]
    for state in rounds(grid, config, start):
        if checkpoint is not None:
            save_checkpoint(state, checkpoint, config_digest=config.digest())
        if config.keep_trajectory:
            trajectory.append(state.weights)
    if config.out:
        save(trained_model(config, state), Path(config.out))
    context.state["weights"] = ArrayRecord([state.weights])
    context.state["trajectory"] = ArrayRecord([np.stack(trajectory)])
    result = {"run": state.run, "resumed_from": start.round, "rounds": [asdict(record) for record in state.history]}
    context.state["result"] = ConfigRecord({"json": json.dumps(result)})


def trained_model(config: RunConfig, state: RoundState) -> Model:
    """The model of `state` with its report card."""
    schema = config.public_schema
    void = any(record.void for record in state.history)
    audit = None if config.plan is None or void else asdict(audit_training(config))
    card = report_card(config, run=state.run, rounds=state.round, void=void, audit=audit)
    return Model(
        spec=config.spec,
        state=unflatten(state.weights, build(config.spec).state_dict()),
        schema=to_json(schema),
        schema_digest=schema.digest(),
        labels=schema.target.labels,
        privacy=card,
    )
