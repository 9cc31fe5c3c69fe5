"""The operator's HTTP server for encrypted queries: it holds the model and sees neither questions nor answers.

GET  /v1/health           alive
GET  /v1/circuit          the public circuit (CIRCUIT frame)
PUT  /v1/keys/{sha256}    a client's public keys (EVALUATION_KEYS frame), named by their hash
POST /v1/query/{sha256}   QUERY frame in, ANSWER frame out, under the keys of that hash

An error is JSON: {"error": kind, "message": text}. Nothing of a query is logged.
"""

import asyncio
import hashlib
import socket
from collections.abc import Awaitable, Callable

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from fedinfer.encrypted import Compiled, EncryptedEngine
from fedinfer.errors import BadUsage, FedinferError, MessageTooLarge

from .keystore import KeyStore

FRAME = "application/octet-stream"
MAX_STORED_KEY_BYTES = 1 << 30
# A key takes more room once its seed is drawn out and every residue is a double.
KEY_MEMORY = 4
MAX_WAITING = 64
SHUTDOWN_S = 5


def create_app(compiled: Compiled) -> FastAPI:
    """An ASGI app that answers encrypted queries to a compiled model."""
    engine = EncryptedEngine(compiled)
    circuit = engine.circuit.to_bytes()
    store = KeyStore(max_bytes=MAX_STORED_KEY_BYTES)
    # A query is shared by all cores: one at a time, and a short queue.
    turn = asyncio.Semaphore(1)
    waiting = 0
    app = FastAPI(title="fedinfer encrypted inference", docs_url=None, redoc_url=None)

    async def in_turn(request: Request, max_bytes: int, work: Callable[[bytes], Response]) -> Response:
        nonlocal waiting
        if waiting >= MAX_WAITING:
            return _error(503, "busy", f"got {waiting} requests waiting, expected fewer; try again")
        waiting += 1
        try:
            body = await _body(request, max_bytes)
            async with turn:
                return await asyncio.to_thread(work, body)
        finally:
            waiting -= 1

    @app.middleware("http")
    async def known_errors(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            return await call_next(request)
        except MessageTooLarge as error:
            return _error(413, "too_large", str(error))
        except FedinferError as error:
            return _error(400, type(error).__name__, str(error))

    @app.get("/v1/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/circuit")
    async def public_circuit() -> Response:
        return Response(circuit, media_type=FRAME)

    @app.put("/v1/keys/{digest}")
    async def put_keys(digest: str, request: Request) -> Response:
        def open_session(keys: bytes) -> Response:
            if hashlib.sha256(keys).hexdigest() != digest:
                return _error(400, "wrong_digest", "keys: got bytes with another SHA-256 than the address says")
            store.put(digest, engine.open(keys), KEY_MEMORY * len(keys))
            return Response(status_code=204)

        return await in_turn(request, engine.circuit.max_key_bytes, open_session)

    @app.post("/v1/query/{digest}")
    async def query(digest: str, request: Request) -> Response:
        def answer(body: bytes) -> Response:
            session = store.get(digest)
            if session is None:
                return _error(404, "unknown_keys", "keys: got none with that SHA-256; upload them again")
            return Response(session.run(body), media_type=FRAME)

        return await in_turn(request, engine.circuit.max_query_bytes, answer)

    return app


async def _body(request: Request, max_bytes: int) -> bytes:
    """Read a request body, and stop reading once it is too large."""
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > max_bytes:
            raise MessageTooLarge(f"body: got more than {max_bytes} bytes")
        parts.append(part)
    return b"".join(parts)


def _error(status: int, kind: str, message: str) -> Response:
    return JSONResponse({"error": kind, "message": message}, status_code=status)


def serve(compiled: Compiled, *, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; `on_ready` gets the URL once the port is taken.

    Raises: BadUsage if the address cannot be listened on.
    """
    app = create_app(compiled)
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise BadUsage(f"address {host}:{port}: cannot listen ({error.strerror}); choose another --port") from None
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=SHUTDOWN_S
    )
    shown = f"[{host}]" if ":" in host else host
    on_ready(f"http://{shown}:{listener.getsockname()[1]}")
    uvicorn.Server(settings).run(sockets=[listener])
