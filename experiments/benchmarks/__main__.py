"""Run every benchmark: `python -m experiments.benchmarks [--quick] [--json FOLDER]`."""

import argparse
from pathlib import Path

from experiments.benchmarks import rounds


def main() -> None:
    """Run them one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each at most a minute")
    parser.add_argument("--json", type=Path, help="a folder for one JSON file each")
    options = parser.parse_args()
    arguments = ["--quick"] if options.quick else []
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
        arguments += ["--json", str(options.json / "rounds.json")]
    rounds.main(arguments)


if __name__ == "__main__":
    main()
