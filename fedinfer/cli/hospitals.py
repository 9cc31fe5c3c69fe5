"""The demo's hospitals: a folder for each with its rows and its ledger, and which run they go on with."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedinfer.cli.console import note
from fedinfer.cli.federation import Node
from fedinfer.cli.methods import write_rows
from fedinfer.cli.parts import part
from fedinfer.cli.train import check_ledgers, make_ledgers
from fedinfer.data import Row, heart_rows, stratified_quarters
from fedinfer.data.heart import SCHEMA_PATH
from fedinfer.errors import CheckpointError, PrivacyError
from fedinfer.settings import RunConfig


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """One device of the headline run: its own folder with its rows and its ledger, and rows held out."""

    name: str
    folder: Path
    test: Sequence[Row]

    @property
    def node(self) -> Node:
        return {"data": str(self.folder / "train.csv"), "schema": str(SCHEMA_PATH), "ledger": str(self.ledger)}

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.sqlite"


def resume_or_start(config: RunConfig, devices: Path, seed: int) -> tuple[RunConfig, list[Hospital], int]:
    """Go on with a run of the same settings and held-out rows that can be finished, or start one by a new name.

    Returns the settings with the run's name, its hospitals below `devices`, and how many of its rounds are done.
    """
    suffix = f"-seed{seed}"
    try:
        state = part("server.checkpoint").load_checkpoint(Path(config.checkpoint), config_digest=config.digest())
    except CheckpointError:
        state = None
    if state is not None and state.run.endswith(suffix):
        resumed = replace(config, run=state.run, resume=True)
        try:
            hospitals = enrol(resumed, devices / state.run, seed, releases=config.rounds - state.round)
        except PrivacyError as error:
            note(f"not going on, but starting anew: {error}")
        else:
            note(f"going on from round {state.round} of run {state.run}")
            return resumed, hospitals, state.round
    fresh = replace(config, run=secrets.token_hex(4) + suffix)
    return fresh, enrol(fresh, devices / fresh.run, seed, releases=config.rounds), 0


def enrol(config: RunConfig, folder: Path, seed: int, *, releases: int) -> list[Hospital]:
    """Lay out one folder for each hospital: its training rows and a ledger with the asked budget.

    Raises: BudgetExceeded or LedgerError if a ledger is there that cannot pay for `releases` more rounds.
    """
    hospitals = []
    for name, rows in heart_rows().items():
        train, test = next(stratified_quarters([int(row["num"] != "0") for row in rows], seed=seed))
        place = folder / name.lower().replace(" ", "-")
        write_rows(place / "train.csv", [rows[i] for i in train])
        hospitals.append(Hospital(name=name, folder=place, test=[rows[i] for i in test]))
    ledgers = [hospital.ledger for hospital in hospitals]
    check_ledgers(config, ledgers, releases=releases)
    make_ledgers(config, ledgers)
    return hospitals
