"""Research scripts: each prints a table and names its source."""
