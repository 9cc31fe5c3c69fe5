"""The HTTP server on loopback: real requests, real keys, and every error as a code and a sentence."""

import hashlib
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
import uvicorn

from clients.asking import ask, describe
from fedinfer.cli.query import start_server
from fedinfer.data import encode, heart_rows, heart_schema, to_json
from fedinfer.encrypted import EncryptedClient, compile_served
from fedinfer.errors import BadUsage, RemoteError
from fedinfer.models import Model, ModelSpec, build, save
from server.inference import create_app, serve
from server.keystore import KeyStore


@pytest.fixture(scope="module")
def model() -> Model:
    schema = heart_schema()
    spec = ModelSpec(family="mlp", inputs=schema.width, hidden=4)
    state = build(spec, seed=3).state_dict()
    return Model(
        spec=spec, state=state, schema=to_json(schema), schema_digest=schema.digest(), labels=schema.target.labels
    )


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    """A server in a thread, on a free port of loopback."""
    server = uvicorn.Server(
        uvicorn.Config(create_app(compile_served(model)), host="127.0.0.1", port=0, log_level="error", ws="none")
    )
    thread = threading.Thread(target=server.run)
    ready = threading.Event()
    startup = server.startup

    async def announced(*args: object, **kwargs: object) -> None:
        await startup(*args, **kwargs)  # type: ignore[arg-type]
        ready.set()

    server.startup = announced  # type: ignore[method-assign]
    thread.start()
    assert ready.wait(timeout=30)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=30)


def test_ask_gives_the_plain_answers(url: str, model: Model) -> None:
    rows = heart_rows()["Cleveland"][:5]
    served = describe(url)
    assert served.schema == heart_schema()
    features = encode(rows, served.schema, with_target=False).features
    asked = ask(url, served, features, rows_per_query=2)
    from fedinfer.inference import Pipeline

    np.testing.assert_allclose(asked.logits, Pipeline(model).logits(features), atol=1e-3)
    assert len(asked.latency_ms) == 3
    assert asked.key_bytes > 0
    assert asked.bytes_up > 0


def test_unknown_keys_are_404_and_wrong_digests_400(url: str) -> None:
    unknown = httpx.post(f"{url}/v1/query/{'0' * 64}", content=b"x")
    assert (unknown.status_code, unknown.json()["error"]) == (404, "unknown_keys")
    wrong = httpx.put(f"{url}/v1/keys/{'0' * 64}", content=b"x")
    assert (wrong.status_code, wrong.json()["error"]) == (400, "wrong_digest")
    garbage = httpx.put(f"{url}/v1/keys/{hashlib.sha256(b'x').hexdigest()}", content=b"x")
    assert (garbage.status_code, garbage.json()["error"]) == (400, "WireError")


def test_a_body_that_is_too_large_is_cut_off_with_413(url: str) -> None:
    response = httpx.put(f"{url}/v1/keys/{'0' * 64}", content=bytes((1 << 26) + 1), timeout=60)
    assert (response.status_code, response.json()["error"]) == (413, "too_large")


def test_a_bad_query_under_good_keys_is_400(url: str) -> None:
    client = EncryptedClient.generate(describe(url).circuit)
    keys = client.evaluation_keys()
    digest = hashlib.sha256(keys).hexdigest()
    assert httpx.put(f"{url}/v1/keys/{digest}", content=keys, timeout=60).status_code == 204
    response = httpx.post(f"{url}/v1/query/{digest}", content=b"not a query")
    assert response.status_code == 400
    assert response.json()["error"] == "WireError"


def test_another_kind_of_server_and_none_at_all_are_one_line(url: str) -> None:
    with pytest.raises(RemoteError, match="got HTTP 404"):
        describe(url + "/elsewhere")
    with pytest.raises(RemoteError, match="no answer"):
        describe("http://127.0.0.1:1")


def test_a_port_in_use_is_refused_before_anything_listens(url: str, model: Model) -> None:
    port = int(url.rpartition(":")[2])
    said: list[str] = []
    with pytest.raises(BadUsage, match=f"address 127.0.0.1:{port}: cannot listen"):
        serve(compile_served(model), host="127.0.0.1", port=port, on_ready=said.append)
    assert said == []


def test_the_server_process_listens_answers_and_stops(model: Model, tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "model.safetensors"
    save(model, path)
    with start_server(path) as wait_for_url:
        address = wait_for_url()
        assert httpx.get(f"{address}/v1/health").json() == {"status": "ok"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/v1/health")


def test_the_key_store_drops_the_least_recently_used() -> None:
    store = KeyStore(max_bytes=100)
    sessions = [object() for _ in range(3)]
    for index, session in enumerate(sessions[:2]):
        store.put(str(index), session, 50)  # type: ignore[arg-type]
    assert store.get("0") is sessions[0]
    store.put("2", sessions[2], 50)  # type: ignore[arg-type]
    assert store.get("1") is None
    assert store.get("0") is sessions[0]
    assert store.get("2") is sessions[2]
