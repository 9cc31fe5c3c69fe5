"""Run every benchmark: `python -m experiments.benchmarks [--quick] [--json FOLDER]`."""

import argparse
from pathlib import Path

from experiments.benchmarks import dp_step, encrypted, noise, rounds, secagg, simulation

BENCHMARKS = {
    "rounds": rounds,
    "simulation": simulation,
    "noise": noise,
    "dp_step": dp_step,
    "secagg": secagg,
    "encrypted": encrypted,
}


def main() -> None:
    """Run them one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="each at most a minute")
    parser.add_argument("--json", type=Path, help="a folder for one JSON file each")
    options = parser.parse_args()
    if options.json:
        options.json.mkdir(parents=True, exist_ok=True)
    for name, benchmark in BENCHMARKS.items():
        arguments = ["--quick"] if options.quick else []
        if options.json:
            arguments += ["--json", str(options.json / f"{name}.json")]
        benchmark.main(arguments)


if __name__ == "__main__":
    main()
