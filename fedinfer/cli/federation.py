"""Identities and a PKI file for devices that live in this process, for the time of one command.

A deployment makes these once, each identity on its own device (`fedinfer pki`). Here one process plays everybody, so
that the secure sums of a run are the real ones, but nobody is kept out by them.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedinfer.files import replace_file
from fedinfer.secagg.rehearsal import make_pki
from fedinfer.settings import RunConfig

Node = dict[str, bool | float | int | str]
# Fewer devices cannot hide one among others: `fedinfer.secagg.Policy`.
LEAST_MEMBERS = 3


def make_members(folder: Path, count: int) -> str:
    """Identities for `count` devices of this machine, and the PKI file that names them; its digest."""
    pki, identities = make_pki(count)
    pki.save(folder / "pki.json")
    digest = pki.digest.hex()
    replace_file(folder / "pki.digest", digest.encode() + b"\n")
    for number, identity in enumerate(identities):
        identity.save(folder / f"device-{number}.identity")
    return digest


def enlist(config: RunConfig, nodes: Sequence[Node], folder: Path) -> tuple[RunConfig, list[Node]]:
    """The settings and nodes of a run by secure sums, with new identities and their PKI file in `folder`."""
    path, digest = str(folder / "pki.json"), make_members(folder, len(nodes))
    members: list[Node] = []
    for number, node in enumerate(nodes):
        place = str(folder / f"device-{number}.identity")
        own: Node = {"pki": path, "pki-digest": digest, "identity": place, "sessions": ":memory:"}
        members.append({**node, **own, "corrupt": config.corrupt, "dropout": config.dropout})
    return replace(config, pki=path, pki_digest=digest), members
