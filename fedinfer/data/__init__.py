"""Tables of rows, a public schema that encodes them, and the bundled data."""

from fedinfer.data.heart import heart_rows, heart_schema
from fedinfer.data.schema import Category, Number, Schema, Target, from_json, read_schema, to_json, write_schema
from fedinfer.data.splits import stratified_quarters
from fedinfer.data.table import Row, Table, encode, read_rows, read_table

__all__ = [
    "Category",
    "Number",
    "Row",
    "Schema",
    "Table",
    "Target",
    "encode",
    "from_json",
    "heart_rows",
    "heart_schema",
    "read_rows",
    "read_schema",
    "read_table",
    "stratified_quarters",
    "to_json",
    "write_schema",
]
