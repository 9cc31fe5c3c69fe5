"""Rows of text to features by the public schema alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedinfer.data import (
    Category,
    Number,
    Schema,
    Target,
    encode,
    from_json,
    heart_rows,
    heart_schema,
    read_schema,
    stratified_quarters,
    to_json,
    write_schema,
)
from fedinfer.data.heart import HOSPITALS
from fedinfer.errors import SchemaError

SMALL = Schema(
    name="small",
    target=Target(column="y", negative=("no",), positive=("yes",)),
    columns=(
        Number(column="n", low=0.0, high=10.0, missing=("", "?"), outside="clamp"),
        Category(column="c", values=("a", "b"), missing=("",)),
    ),
)


def test_the_encoding_is_what_it_says() -> None:
    rows = [
        {"n": "10", "c": "a", "y": "yes"},
        {"n": "?", "c": "", "y": "no"},
        {"n": "12", "c": "b", "y": "no"},
        {"n": " 5 ", "c": "b", "y": "no"},
    ]
    table = encode(rows, SMALL, with_target=True)
    expected = [[1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 1, 0], [0, 0, 0, 1, 0]]
    np.testing.assert_array_equal(table.features, np.array(expected, np.float32))
    np.testing.assert_array_equal(table.labels, [1, 0, 0, 0])
    assert table.clamped == {"n": 1}
    assert SMALL.feature_names == ("n", "n missing", "c=a", "c=b", "c missing")
    assert "features" not in repr(table)


@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["a", "b", ""]))
def test_every_feature_lies_in_minus_one_to_one_and_depends_on_its_row_alone(number: float, category: str) -> None:
    row = {"n": repr(number), "c": category}
    alone = encode([row], SMALL, with_target=False).features
    assert (np.abs(alone) <= 1.0).all()
    among = encode([{"n": "1", "c": "a"}, row, {"n": "9", "c": "b"}], SMALL, with_target=False).features
    np.testing.assert_array_equal(among[1], alone[0])


def test_schemas_round_trip_as_json_and_toml(tmp_path: object) -> None:
    from pathlib import Path

    path = Path(str(tmp_path)) / "schema.toml"
    for schema in (SMALL, heart_schema()):
        assert from_json(to_json(schema)) == schema
        path.write_text(write_schema(schema), encoding="utf-8")
        assert read_schema(path) == schema
        assert read_schema(path).digest() == schema.digest()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"columns": []}, "got no columns"),
        ({"columns": [{"kind": "number", "column": "n"}]}, "got no 'low', expected its public range"),
        ({"columns": [{"kind": "number", "column": "n", "low": 3, "high": 1}]}, "expected low < high"),
        ({"columns": [{"kind": "text", "column": "n"}]}, "got kind 'text'"),
        ({"columns": [{"kind": "category", "column": "c", "values": ["a"]}]}, "expected two or more, all different"),
        ({"columns": [{"kind": "category", "column": "y", "values": ["a", "b"]}]}, "got column 'y' twice"),
        ({"target": {"column": "y", "negative": ["0"], "positive": ["0"]}}, "all different"),
        ({"target": {"column": "y", "negative": "0", "positive": ["1"]}}, "expected a list of texts"),
        ({"extra": 1}, "got unknown field 'extra'"),
    ],
)
def test_a_schema_that_cannot_be_is_refused(change: dict[str, object], expected: str) -> None:
    with pytest.raises(SchemaError, match=expected):
        from_json({**to_json(SMALL), **change})


def test_the_bundled_table_is_the_published_one() -> None:
    rows = heart_rows()
    assert {name: len(part) for name, part in rows.items()} == dict(zip(HOSPITALS, (304, 293, 123, 200), strict=True))
    positive = [int(encode(part, heart_schema(), with_target=True).labels.sum()) for part in rows.values()]
    assert positive == [139, 106, 115, 149]


@given(st.lists(st.integers(0, 2), min_size=4, max_size=60), st.integers(0, 5))
def test_quarters_are_disjoint_whole_and_stratified(classes: list[int], seed: int) -> None:
    quarters = list(stratified_quarters(classes, seed=seed))
    tests = np.concatenate([test for _, test in quarters])
    assert sorted(tests) == list(range(len(classes)))
    for train, test in quarters:
        assert not set(train) & set(test)
        assert len(train) + len(test) == len(classes)
        for value in set(classes):
            share = classes.count(value) / 4
            assert np.floor(share) <= sum(classes[i] == value for i in test) <= np.ceil(share)
