"""`fedinfer pki`: who takes part in secure sums."""

import os
from pathlib import Path

from fedinfer.cli.console import out, show_json, show_table
from fedinfer.cli.federation import LEAST_MEMBERS, make_members
from fedinfer.errors import BadInput, BadUsage
from fedinfer.privacy import PrivacyLedger
from fedinfer.secagg import identities
from fedinfer.secagg.identities import Identity
from fedinfer.sums.membership import SIMULATED_MEMBERS


def init_pki(path: Path, *, as_json: bool) -> None:
    """Make a PKI file without members."""
    identities.init(path)
    if as_json:
        show_json({"path": str(path), "members": 0})
    else:
        out.print(f"{path}: made; add each device with `fedinfer pki add {path} NAME KEY`")


def new_identity(path: Path, *, as_json: bool) -> None:
    """Make a device's own key and say its public half."""
    device = Identity.generate(os.urandom)
    device.save(path)
    if as_json:
        show_json({"path": str(path), "public_key": device.public.hex()})
    else:
        out.print(f"{path}: made; keep it on this device")
        out.print(f"public key {device.public.hex()}: give it to whoever keeps the PKI file")


def add_member(path: Path, name: str, key: str, *, as_json: bool) -> None:
    """Append a device by its public key in hexadecimal, and say the digest to pin."""
    try:
        public = bytes.fromhex(key)
    except ValueError:
        raise BadUsage(f"key: got {key[:80]!r}, expected 64 hexadecimal digits") from None
    digest = identities.add(path, name, public).digest.hex()
    if as_json:
        show_json({"path": str(path), "name": name, "digest": digest})
    else:
        out.print(f"{path}: {name} added")
        out.print(f"digest {digest}: pin it on every device, the old ones too")


def simulate_members(folder: Path, *, count: int, epsilon: float | None, delta: float, as_json: bool) -> None:
    """Make what `count` simulated devices need for secure sums: identities, their PKI file, ledgers if `epsilon` is."""
    if count < LEAST_MEMBERS:
        raise BadUsage(f"--count: got {count}, expected at least {LEAST_MEMBERS}; fewer cannot hide one among others")
    if (folder / "pki.json").exists():
        raise BadInput(f"{folder}: got a PKI file already; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    digest = make_members(folder, count)
    for number in range(count) if epsilon is not None else ():
        PrivacyLedger.create(folder / f"device-{number}.ledger", epsilon=epsilon or 0.0, delta=delta).close()
    if as_json:
        show_json({"path": str(folder), "pki": str(folder / "pki.json"), "digest": digest, "members": count})
    else:
        out.print(f"{folder}: {count} members; start the simulation with {SIMULATED_MEMBERS}={folder.absolute()}")
        out.print(f"digest {digest}: the server's pki-digest, for pki={(folder / 'pki.json').absolute()}")


def show_pki(path: Path, *, as_json: bool) -> None:
    """Print the digest to pin and the members."""
    digest, members = identities.show(path)
    if as_json:
        told = [{"name": name, "public_key": key} for name, key in members]
        show_json({"path": str(path), "digest": digest, "members": told})
    else:
        out.print(f"{path}: digest {digest}")
        show_table("members", ("name", "public key"), members)
