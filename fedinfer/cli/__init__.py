"""The command line. It starts clients and servers, so it stands above them; each command imports what it needs."""

from fedinfer.cli.main import main

__all__ = ["main"]
