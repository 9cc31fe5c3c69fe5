"""Clients' public keys in memory, found by their SHA-256: the least recently used leave when the space is full."""

from collections import OrderedDict
from threading import Lock

from fedinfer.encrypted import EncryptedSession


class KeyStore:
    """Open sessions by the hash of their keys, at most `max_bytes` of keys together."""

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = Lock()
        self._sessions: OrderedDict[str, tuple[EncryptedSession, int]] = OrderedDict()

    def put(self, digest: str, session: EncryptedSession, size_bytes: int) -> None:
        """Keep a session; drop the oldest ones that no longer fit."""
        with self._lock:
            self._sessions.pop(digest, None)
            self._sessions[digest] = (session, size_bytes)
            while sum(size for _, size in self._sessions.values()) > self._max_bytes and len(self._sessions) > 1:
                self._sessions.popitem(last=False)

    def get(self, digest: str) -> EncryptedSession | None:
        """The session of these keys, or None if it is unknown or was dropped."""
        with self._lock:
            if digest not in self._sessions:
                return None
            self._sessions.move_to_end(digest)
            return self._sessions[digest][0]
