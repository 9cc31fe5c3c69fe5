"""`fedinfer simulate`: a file in, weights, logs and a plot out; what cannot be is one line and leaves nothing."""

import csv
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.cli.conftest import Run, interrupt

CONFIGS = Path(__file__).parents[2] / "experiments" / "configs"
SMALL = """
    clients = 6
    rounds = 4
    seed = 1
    [data]
    source = "rows.npz"
    [task]
    lr = 0.2
    steps = 2
    [output]
    weights = "out/weights.safetensors"
    json_lines = "out/log.jsonl"
    csv = "out/log.csv"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the rows of a small problem, and a module of the user's own."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(80, 3))
    np.savez(tmp_path / "rows.npz", x=x, y=(x[:, 0] > 0).astype(int) + (x[:, 1] > 0.5))
    own = """
        import numpy as np
        from torch import nn

        def rows():
            with np.load("rows.npz") as file:
                return file["x"], file["y"]

        def network():
            return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

        wide = nn.Linear(7, 3)
        text = "no model"
    """
    (tmp_path / "own_parts.py").write_text(textwrap.dedent(own))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, *changes: tuple[str, str]) -> Path:
    text = textwrap.dedent(text)
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "run.toml"
    path.write_text(text)
    return path


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file() and "__pycache__" not in str(path)}


def tensors(path: Path) -> dict[str, np.ndarray]:
    with safe_open(str(path), framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def test_the_example_learns_digits_and_leaves_all_its_files(folder: Path, run: Run) -> None:
    result = run("simulate", "--config", CONFIGS / "digits.toml", "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert summary["metrics"]["accuracy"] > 0.9
    assert (summary["epsilon"], summary["epsilon_void"], summary["updates"]) == (None, True, 800)
    assert result.err == ""
    assert {path.name for path in (folder / "digits").iterdir()} == {
        "weights.safetensors",
        "weights.safetensors.checkpoint",
        "rounds.csv",
        "rounds.jsonl",
        "rounds.png",
    }
    assert (folder / "digits" / "rounds.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "digits" / "rounds.csv").open(newline="") as file:
        assert [int(row["round"]) for row in csv.DictReader(file)] == list(range(41))
    with safe_open(str(folder / "digits" / "weights.safetensors"), framework="np") as file:
        lasting = json.loads(file.metadata()["fedinfer-simulation-result"])
    assert lasting == {name: summary[name] for name in lasting}


def test_the_private_example_promises_its_epsilon(folder: Path, run: Run) -> None:
    text = (CONFIGS / "digits_private.toml").read_text().replace("rounds = 60", "rounds = 3")
    result = run("simulate", "--config", write(folder, text), "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert (summary["unit"], summary["adversary"], summary["epsilon_void"]) == ("client", "outsider", False)
    assert 7.9 < summary["epsilon"] <= 8.0
    void = run("simulate", "--config", write(folder, "seed = 1\n" + text), "--json")
    assert json.loads(void.out)["epsilon"] is None
    assert "ε is void" in run("simulate", "--config", write(folder, "seed = 1\n" + text)).out


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [('"rows.npz"', '"own_parts:rows"'), ("[task]", '[model]\nfamily = "own_parts:network"\n[task]')],
        [('"rows.npz"', '"heart-disease"'), ("lr = 0.2", 'optimiser = "adam"\nlr = 0.01')],
        [("[task]", '[rule]\nname = "fedyogi"\nlearning_rate = 0.1\n[cohort]\nsampler = "cyclic"\nperiod = 2\n[task]')],
        [("[task]", '[partition]\nscheme = "dirichlet"\nalpha = 0.1\nseed = 3\n[task]')],
        [("[task]", '[partition]\nscheme = "shards"\nper_client = 1\n[task]')],
        [
            (
                "[task]",
                '[privacy]\nunit = "example"\nepsilon = 4\ndelta = 1e-3\nclip_norm = 1\nsampling_rate = 0.3\n[task]',
            ),
            ("seed = 1\n", ""),
        ],
    ],
    ids=["npz", "own parts", "heart", "yogi", "dirichlet", "shards", "examples"],
)
def test_what_a_file_can_say(changes: list[tuple[str, str]], folder: Path, run: Run) -> None:
    result = run("simulate", "--config", write(folder, SMALL, *changes), "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    assert 0.0 <= summary["metrics"]["accuracy"] <= 1.0
    assert (summary["unit"] == "example") == any("privacy" in new for _, new in changes)
    assert len((folder / "out" / "log.jsonl").read_text().splitlines()) == 5


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(folder: Path, run: Run) -> None:
    config = write(folder, SMALL, ("rounds = 4", "rounds = 150"), ("weights.s", "whole.s"))
    assert run("simulate", "--config", config).code == 0
    config = write(folder, SMALL, ("rounds = 4", "rounds = 150"))
    log = folder / "out" / "log.jsonl"
    log.unlink()
    stopped = interrupt(
        ["simulate", "--config", config], when=lambda: log.exists() and len(log.read_bytes().splitlines()) > 20
    )
    assert stopped.code == 130
    assert "the same with --resume goes on" in stopped.err
    assert not (folder / "out" / "weights.safetensors").exists()
    assert run("simulate", "--config", config, "--resume").code == 0
    whole, broken = tensors(folder / "out" / "whole.safetensors"), tensors(folder / "out" / "weights.safetensors")
    assert all(np.array_equal(whole[name], broken[name]) for name in whole)
    assert [json.loads(line)["round"] for line in log.read_text().splitlines()] == list(range(151))


BAD = {
    "no file": (None, 1, "nowhere.toml: got no readable file"),
    "not toml": ([("clients = 6", "clients = ")], 1, "got a file that is not TOML"),
    "unknown key": ([("rounds = 4", "rounds = 4\nround = 5")], 2, "got unknown key 'round', expected backend, clients"),
    "unknown section": ([("[task]", "[tasks]")], 2, "got unknown key 'tasks'"),
    "unknown key of a section": (
        [("lr = 0.2", "lr = 0.2\nstep = 3")],
        2,
        "[task] got unknown key 'step', expected batch_size, epochs, lr, momentum, optimiser, steps",
    ),
    "section as value": ([("seed = 1", "seed = 1\nrule = 3")], 2, "rule: got 3, expected a section [rule]"),
    "type": ([("rounds = 4", 'rounds = "4"')], 2, "rounds: got '4', expected a whole number"),
    "boolean": ([("rounds = 4", "rounds = true")], 2, "rounds: got True, expected a whole number"),
    "not finite": ([("lr = 0.2", "lr = inf")], 2, "[task] lr: got inf, expected a finite number"),
    "missing": ([("clients = 6", "")], 2, "clients: got none, expected one"),
    "clients": ([("clients = 6", "clients = 0")], 2, "clients: got 0, expected at least 1"),
    "backend": ([("seed = 1", 'seed = 1\nbackend = "flower"')], 2, "backend: got 'flower', expected one of vectorised"),
    "device": ([("seed = 1", 'seed = 1\ndevice = "tpu"')], 2, "device: got 'tpu'"),
    "optimiser": ([("lr = 0.2", 'optimiser = "lion"')], 2, "[task] optimiser: got 'lion', expected one of sgd, adam"),
    "lr": ([("lr = 0.2", "lr = -1.0")], 2, "[task] lr: got -1.0"),
    "sampler": ([("[task]", '[cohort]\nsampler = "all"\n[task]')], 2, "[cohort] sampler: got 'all', expected one of"),
    "size": ([("[task]", '[cohort]\nsampler = "fixed size"\nsize = 9\n[task]')], 2, "[cohort] fixed size: got 9 of 6"),
    "scheme": ([("[task]", '[partition]\nscheme = "sorted"\n[task]')], 2, "[partition] scheme: got 'sorted'"),
    "alpha": (
        [("[task]", '[partition]\nscheme = "dirichlet"\n[task]')],
        2,
        "[partition] alpha: got none, expected one",
    ),
    "rule": ([("[task]", '[rule]\nname = "fedfast"\n[task]')], 2, "[rule] rule: got 'fedfast', expected one of fedsgd"),
    "steps and epochs": ([("steps = 2", "steps = 2\nepochs = 2")], 2, "got steps=2 and epochs=2"),
    "held out": ([('"rows.npz"', '"rows.npz"\nheld_out = 1.0')], 2, "[data] held_out: got 1.0"),
    "hidden": ([("[task]", "[model]\nhidden = [0]\n[task]")], 2, "[model] hidden: got [0]"),
    "hidden type": ([("[task]", "[model]\nhidden = 8\n[task]")], 2, "[model] hidden: got 8, expected a list"),
    "epsilon": ([("[task]", "[privacy]\nepsilon = 0.0\ndelta = 1e-5\nclip_norm = 1.0\n[task]")], 2, "epsilon: got 0"),
    "unit": (
        [("[task]", '[privacy]\nunit = "row"\nepsilon = 1.0\ndelta = 1e-5\nclip_norm = 1.0\n[task]')],
        2,
        "[privacy] unit: got 'row'",
    ),
    "source": ([('"rows.npz"', '"mnist"')], 2, "source: got 'mnist', expected digits, heart-disease, FILE.npz or"),
    "no npz": ([('"rows.npz"', '"none.npz"')], 1, "none.npz: got no such file"),
    "not an npz": ([('"rows.npz"', '"own_parts.npz"')], 1, "own_parts.npz: got a file that is not an .npz"),
    "no module": ([('"rows.npz"', '"nowhere:rows"')], 1, "nowhere:rows: got ModuleNotFoundError"),
    "no function": ([('"rows.npz"', '"own_parts:text"')], 2, "own_parts:text: got a str, expected a function"),
    "no model": ([("[task]", '[model]\nfamily = "own_parts:text"\n[task]')], 2, "own_parts:text: got a str"),
    "other rows": ([("[task]", '[model]\nfamily = "own_parts:wide"\n[task]')], 2, "own_parts:wide: got rows of shape"),
    "family": ([("[task]", '[model]\nfamily = "tree"\n[task]')], 2, "[model] family: got 'tree'"),
    "plot alone": ([('json_lines = "out/log.jsonl"', 'plot = "out/plot.png"')], 2, "[output] plot: got no log"),
    "plot kind": ([("[output]", '[output]\nplot = "out/plot.bmp"')], 2, "expected a file that ends in .png"),
    "one file": ([("out/log.csv", "out/log.jsonl")], 2, "[output] got one file for two things"),
    "a folder": ([("out/log.csv", "sub")], 1, "output sub: got a folder, expected a file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_is_one_line_and_leaves_nothing(kind: str, folder: Path, run: Run) -> None:
    changes, code, expected = BAD[kind]
    (folder / "own_parts.npz").write_text("no npz")
    (folder / "sub").mkdir()
    path = folder / "nowhere.toml" if changes is None else write(folder, SMALL, *changes)
    before = names_in(folder)
    result = run("simulate", "--config", path)
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert expected in result.err
    assert names_in(folder) == before


def test_resuming_needs_a_checkpoint_of_the_same_run(folder: Path, run: Run) -> None:
    config = write(folder, SMALL)
    missing = run("simulate", "--config", config, "--resume")
    assert (missing.code, missing.err.count("\n")) == (1, 1)
    assert "got no such file; run once without resuming" in missing.err
    assert run("simulate", "--config", config).code == 0
    other = run("simulate", "--config", write(folder, SMALL, ("seed = 1", "seed = 2")), "--resume")
    assert other.code == 1
    assert "a run with other settings" in other.err


def test_help_shows_an_example(run: Run) -> None:
    result = run("simulate", "--help")
    assert result.code == 0
    assert "fedinfer simulate --config" in result.out
    assert "--resume" in result.out
