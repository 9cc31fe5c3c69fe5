"""The bundled table: 920 patients of four hospitals (UCI Heart Disease, 1989, CC BY 4.0; see CITATION.md)."""

from pathlib import Path

from fedinfer.data.schema import Schema, read_schema
from fedinfer.data.table import Row, read_rows

FOLDER = Path(__file__).parent / "heart_disease"
SCHEMA_PATH = FOLDER / "schema.toml"
HOSPITALS = ("Cleveland", "Hungary", "Switzerland", "VA Long Beach")


def heart_schema() -> Schema:
    """The public schema of the table."""
    return read_schema(SCHEMA_PATH)


def heart_rows() -> dict[str, list[Row]]:
    """The rows by hospital, in the order of `HOSPITALS`.

    >>> {name: len(rows) for name, rows in heart_rows().items()}
    {'Cleveland': 304, 'Hungary': 293, 'Switzerland': 123, 'VA Long Beach': 200}
    """
    rows = read_rows(FOLDER / "patients.csv")
    return {hospital: [row for row in rows if row["dataset"] == hospital] for hospital in HOSPITALS}
