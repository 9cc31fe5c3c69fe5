"""A model file is whole and ours, or it is refused with one sentence."""

import contextlib
import json
import pickle
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save as to_bytes

from fedinfer.errors import BadUsage, ModelFileError
from fedinfer.models import FAMILIES, Model, ModelSpec, build, load, save
from fedinfer.models.file import KEY


def a_model(family: str = "mlp") -> Model:
    spec = ModelSpec(family=family, inputs=5, hidden=3)
    return Model(
        spec=spec,
        state=build(spec, seed=1).state_dict(),
        schema={"a": 1},
        schema_digest="d",
        labels=("no", "yes"),
        threshold=0.4,
        privacy={"epsilon": 1.0},
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_round_trips(family: str, tmp_path: Path) -> None:
    model = a_model(family)
    save(model, tmp_path / "m")
    back = load(tmp_path / "m")
    assert all(back.state[name].equal(tensor) for name, tensor in model.state.items())
    assert list(back.state) == list(model.state)
    assert (back.spec, back.schema, back.labels, back.threshold) == (model.spec, model.schema, model.labels, 0.4)
    x = torch.ones(2, 5)
    assert back.module()(x).equal(model.module()(x))


def test_damage_gives_a_model_file_error_or_the_same_kind_of_model(tmp_path: Path) -> None:
    save(a_model(), tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    generator = random.Random(3)
    assert load(tmp_path / "m").threshold == 0.4
    for _ in range(200):
        damaged = bytearray(whole)
        if generator.random() < 0.5:
            del damaged[generator.randrange(len(damaged)) :]
        else:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        (tmp_path / "m").write_bytes(bytes(damaged))
        # A flipped bit in a weight is still a model; everything else is refused by one kind of error.
        with contextlib.suppress(ModelFileError):
            load(tmp_path / "m")


@pytest.mark.parametrize(
    ("header", "tensors", "expected"),
    [
        ({"format": 2}, {}, "got format 2, expected 1"),
        ({"spec": {"family": "forest", "inputs": 5, "hidden": 3}}, {}, "got 'forest'"),
        ({"threshold": 1.5}, {}, "threshold: got 1.5"),
        ({"labels": ["one"]}, {}, "does not hold"),
        ({}, {"extra": torch.zeros(1)}, "got tensors"),
        ({}, {"0.bias": torch.full((3,), torch.nan)}, "not finite"),
    ],
)
def test_a_header_or_tensor_that_does_not_hold(
    header: dict[str, object], tensors: dict[str, torch.Tensor], expected: str, tmp_path: Path
) -> None:
    model = a_model()
    good = {
        "format": 1,
        "spec": {"family": "mlp", "inputs": 5, "hidden": 3},
        "schema": {},
        "schema_digest": "d",
        "labels": ["no", "yes"],
        "threshold": 0.5,
        "privacy": {},
    }
    metadata = {KEY: json.dumps({**good, **header})}
    (tmp_path / "m").write_bytes(to_bytes({**dict(model.state), **tensors}, metadata=metadata))
    with pytest.raises(ModelFileError, match=expected):
        load(tmp_path / "m")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.write_text, (tmp_path / "ran", "x"))

    (tmp_path / "m").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelFileError, match="not safetensors"):
        load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = build(ModelSpec(family="mlp", inputs=4), seed=9)
    assert torch.rand(3).equal(expected)
    two = build(ModelSpec(family="mlp", inputs=4), seed=9)
    assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(BadUsage, match="model inputs: got 0"):
        ModelSpec(family="mlp", inputs=0)
