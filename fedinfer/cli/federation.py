"""Identities and a PKI file for devices that live in this process, for the time of one command.

A deployment makes these once, each identity on its own device (`fedinfer pki`). Here one process plays everybody, so
that the secure sums of a run are the real ones, but nobody is kept out by them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedinfer.secagg.rehearsal import make_pki
from fedinfer.settings import RunConfig

Node = dict[str, bool | float | int | str]
# Fewer devices cannot hide one among others: `fedinfer.secagg.Policy`.
LEAST_MEMBERS = 3


def enlist(config: RunConfig, nodes: Sequence[Node], folder: Path) -> tuple[RunConfig, list[Node]]:
    """The settings and nodes of a run by secure sums, with new identities and their PKI file in `folder`."""
    pki, identities = make_pki(len(nodes))
    path = folder / "pki.json"
    pki.save(path)
    digest = pki.digest.hex()
    members: list[Node] = []
    for number, (node, identity) in enumerate(zip(nodes, identities, strict=True)):
        place = folder / f"device-{number}.identity"
        identity.save(place)
        own: Node = {"pki": str(path), "pki-digest": digest, "identity": str(place), "sessions": ":memory:"}
        members.append({**node, **own, "corrupt": config.corrupt, "dropout": config.dropout})
    return replace(config, pki=str(path), pki_digest=digest), members
