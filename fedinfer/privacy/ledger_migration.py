"""From format 1, which was not signed, to format 2: a signing key, and an entry that vouches for those before it.

The new key waits under another name until the ledger says that it is its key. So a crash leaves either a ledger of
format 1 without a key, or one of format 2; and a ledger of format 1 *beside* a key was not left by a crash.
"""

from pathlib import Path

from fedinfer.errors import LedgerError
from fedinfer.privacy.ledger_history import History
from fedinfer.privacy.ledger_store import FORMAT, Store, make_entry
from fedinfer.privacy.signing import SigningKey


def migrate(store: Store, path: Path) -> None:
    """Bring the open ledger at `path` to this format.

    Raises: LedgerError if its entries do not follow from each other, or a signing key is there already.
    """
    key_path = beside(path)
    with store.transaction():
        # Another process may have done it while this one waited for the lock.
        if store.format != FORMAT:
            if key_path.exists():
                raise LedgerError(
                    f"ledger {path}: got format 1, which is not signed, beside a signing key; somebody may have put it "
                    "there to have it signed. If you know why, move the key away"
                )
            before = store.format
            store.migrate()
            history = History(str(path))
            for entry in store.entries():
                history.add(entry, signature=False)
            key = SigningKey.open_or_make(_waiting(key_path))
            vouching = make_entry(
                key,
                number=history.number + 1,
                before=history.hash,
                kind="migrate",
                run="",
                round=0,
                attempt=0,
                body={"from": before, "to": FORMAT, "public_key": key.public},
            )
            store.append(vouching)
    finish_migration(key_path)


def finish_migration(key_path: Path) -> None:
    """Give the key of a migrated ledger its name, if a crash came before that."""
    waiting = _waiting(key_path)
    if waiting.exists() and not key_path.exists():
        waiting.replace(key_path)


def beside(path: Path) -> Path:
    """Where a ledger's signing key is unless it was made elsewhere."""
    return Path(f"{path}.key")


def _waiting(key_path: Path) -> Path:
    return Path(f"{key_path}.new")
