"""HTTP to an encrypted-inference server, with every failure in one line."""

from typing import Self
from urllib.parse import urlsplit

import httpx

from fedinfer.encrypted.frames import MAX_ANSWER_BYTES
from fedinfer.errors import BadUsage, RemoteError

TIMEOUT_S = 60.0


class Transport:
    """One connection to a server; use it in a `with` block."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadUsage(f"URL: got {url!r}, expected http://HOST:PORT as `fedinfer serve` prints it")
        self._url = url.rstrip("/")
        self._client = httpx.Client(timeout=TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def send(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Send a request and return the body of its answer.

        Raises: RemoteError if the server is not there, is not one of ours, or answers with an error.
        """
        try:
            with self._client.stream(method, self._url + path, content=body) as response:
                parts: list[bytes] = []
                size = 0
                for part in response.iter_bytes():
                    size += len(part)
                    if size > MAX_ANSWER_BYTES:
                        raise RemoteError(f"{self._url}{path}: got more than {MAX_ANSWER_BYTES} bytes")
                    parts.append(part)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise RemoteError(
                f"{self._url}: no answer ({error or type(error).__name__}); is `fedinfer serve` running?"
            ) from None
        data = b"".join(parts)
        if response.status_code >= 300:
            raise RemoteError(f"{self._url}{path}: got HTTP {response.status_code} ({_reason(response, data)})")
        return data


def _reason(response: httpx.Response, data: bytes) -> str:
    try:
        fields = httpx.Response(200, content=data).json()
        return f"{fields['error']}: {fields['message']}"[:300]
    except (ValueError, KeyError, TypeError):
        return f"{response.reason_phrase}; is this a fedinfer server?"
