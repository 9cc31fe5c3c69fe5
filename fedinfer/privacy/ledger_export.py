"""A ledger as JSON lines, for somebody who may see what was spent but not hold the file.

The first line says the enrolment id and the public key; each other line is an entry with its hash and signature. To
check it, no database and no private key is needed. Who gets an export should have the public key from another source:
a whole ledger made up under another key is in itself in order.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from fedinfer.errors import LedgerError
from fedinfer.privacy.ledger_history import History
from fedinfer.privacy.ledger_store import Entry

FORMAT = 1


def check_entries(name: str, entries: Iterable[Entry], *, public_key: str | None) -> History:
    """Read all entries, with every signature.

    Raises: LedgerError at the first that is not right, or for another public key than the expected one.
    """
    history = History(name)
    for entry in entries:
        history.add(entry, signature=True)
    history.check_key(public_key)
    return history


def export_lines(name: str, entries: Iterable[Entry]) -> str:
    """The text of an export.

    Raises: LedgerError if the entries do not verify.
    """
    all_entries = tuple(entries)
    history = check_entries(name, all_entries, public_key=None)
    header = {
        "fedinfer_ledger_export": FORMAT,
        "enrolment": history.enrolment.id,
        "public_key": history.public_key,
        "entries": history.number,
    }
    return "".join(json.dumps(line) + "\n" for line in (header, *map(asdict, all_entries)))


def check_export(path: Path, *, public_key: str | None) -> History:
    """Verify an export with nothing but the file.

    Raises: LedgerError if a line is not right or lines are missing; OSError if it cannot be read.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        header = json.loads(lines[0])
        known = header["fedinfer_ledger_export"] == FORMAT
        told = (header["enrolment"], header["public_key"], header["entries"])
    except (ValueError, TypeError, KeyError, IndexError):
        known = False
    if not known:
        raise LedgerError(f"{path}: got a file that is neither a ledger nor an export of format {FORMAT}")
    history = check_entries(str(path), _entries(path, lines[1:]), public_key=public_key)
    if told != (history.enrolment.id, history.public_key, history.number):
        raise LedgerError(f"{path}: got a first line that says {told}, expected what the {history.number} entries say")
    return history


def _entries(path: Path, lines: Iterable[str]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 2):
        try:
            yield Entry(**json.loads(line))
        except (ValueError, TypeError):
            raise LedgerError(f"{path}, line {number}: got no entry of a ledger") from None
