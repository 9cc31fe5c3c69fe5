"""What a server keeps of a compiled network, what it says of it, and what a client keeps of its key."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from fedinfer.encrypted import (
    Compiled,
    EncryptedClient,
    EncryptedEngine,
    PublicCircuit,
    compile_model,
    load_keys,
    save_keys,
)
from fedinfer.encrypted.clear import InsecureClear
from fedinfer.errors import BadUsage, EncryptedError, ModelFileError
from tests.encrypted.networks import networks

ROWS = torch.randn(48, 30, generator=torch.Generator().manual_seed(1)) * 0.5
PASSPHRASE = b"four hospitals"


@functools.cache
def compiled(objective: str = "latency") -> Compiled:
    net, _ = networks()["mlp 30-64-2"]
    return compile_model(net.eval(), ROWS[:1], calibration=ROWS, objective=objective)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_plan_answers_the_same_after_saving_and_loading(objective: str, tmp_path: Path) -> None:
    one = compiled(objective)
    one.save(tmp_path / "plan")
    again = Compiled.load(tmp_path / "plan")
    assert again.public.to_bytes() == one.public.to_bytes()
    rows = [ROWS[:5].double().numpy()]
    np.testing.assert_array_equal(again.simulate(rows, noise=None), one.simulate(rows, noise=None))
    client = EncryptedClient.generate(PublicCircuit.from_bytes(again.public.to_bytes()))
    session = EncryptedEngine(again).open(client.evaluation_keys())
    answer = client.decrypt(session.run(client.encrypt(ROWS[:5].numpy())))
    assert np.abs(answer - one.simulate(rows, noise=None)).max() <= one.public.error


@pytest.mark.parametrize("damage", [b"", b"no plan", None])
def test_a_damaged_plan_is_refused_in_one_line(damage: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "plan"
    compiled().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if damage is None else damage)
    with pytest.raises(ModelFileError, match=r"plan .*fedinfer compile") as caught:
        Compiled.load(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="got no such file"):
        Compiled.load(tmp_path / "nowhere")


def test_verify_finds_errors_below_the_stated_one_and_would_find_a_larger() -> None:
    found = compiled().verify(rows=300, encrypted_rows=4)
    assert found.holds
    assert (found.rows, found.encrypted_rows, found.clear_changed) == (300, 4, 0.0)
    assert 0.0 < found.encrypted_error < found.stated_error
    with pytest.raises(BadUsage, match="no calibration rows"):
        Compiled(public=compiled().public, private=compiled().private).verify()


def test_explain_has_a_line_for_every_step_and_counts_its_rotations() -> None:
    explained = compiled().explain()
    assert [layer.operation.split(",")[0] for layer in explained.layers] == ["map", "square", "map"]
    assert [layer.layer for layer in explained.layers] == ["0", "1", "2"]
    assert sum(layer.rotations for layer in explained.layers) == len(compiled().public.keys.rotations)
    assert all(layer.measured_ms > 0 and layer.predicted_ms > 0 and layer.error > 0 for layer in explained.layers)
    assert len(str(explained).splitlines()) == len(explained.layers) + 4


def test_a_stored_key_decrypts_as_before_and_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    client = EncryptedClient.generate(compiled().public)
    session = EncryptedEngine(compiled()).open(client.evaluation_keys())
    answer = session.run(client.encrypt(ROWS[:1].numpy()))
    path = tmp_path / "keys"
    save_keys(client, path, PASSPHRASE)
    again = load_keys(compiled().public, path, PASSPHRASE)
    np.testing.assert_allclose(again.decrypt(answer), client.decrypt(answer))
    assert path.stat().st_mode & 0o077 == 0
    # The key in the clear is nowhere in the file.
    secret = client._secret.stored_for_key_store()  # type: ignore[attr-defined]
    data = path.read_bytes()
    assert all(secret[at : at + 16] not in data for at in range(0, len(secret) - 16, 997))


def test_a_stored_key_needs_its_passphrase_its_circuit_and_every_byte(tmp_path: Path) -> None:
    client = EncryptedClient.generate(compiled().public)
    path = tmp_path / "keys"
    save_keys(client, path, PASSPHRASE)
    with pytest.raises(EncryptedError, match="wrong passphrase"):
        load_keys(compiled().public, path, b"five hospitals")
    with pytest.raises(EncryptedError, match="another circuit"):
        load_keys(compiled("throughput").public, path, PASSPHRASE)
    with pytest.raises(EncryptedError, match="no such file"):
        load_keys(compiled().public, tmp_path / "nowhere", PASSPHRASE)
    data = bytearray(path.read_bytes())
    for at in (len(data) - 1, len(data) // 2):
        changed = data.copy()
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(EncryptedError, match="changed file"):
            load_keys(compiled().public, path, PASSPHRASE)
    with pytest.raises(BadUsage, match="expected 8 or more"):
        save_keys(client, path, b"short")
    with pytest.raises(BadUsage, match="expected one of CKKS"):
        save_keys(EncryptedClient.generate(compiled().public, InsecureClear()), path, PASSPHRASE)
