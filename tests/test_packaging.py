"""The wheel holds every package and every data file, and runs where only the dependencies are installed."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk() -> set[str]:
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fedinfer").rglob("__init__.py")}
    return found | {"fedinfer_clients", "fedinfer_server"}


def test_the_list_of_packages_is_the_folders() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_flower_configuration_is_the_settings() -> None:
    from fedinfer.settings import RunConfig

    assert PROJECT["tool"]["flwr"]["app"]["config"] == RunConfig().to_flat()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git knows and what lies beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_modules_and_data_and_no_package_called_server(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in packages_on_disk():
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert {"fedinfer/py.typed", "fedinfer/data/heart_disease/patients.csv"} <= names
    assert {"fedinfer/data/heart_disease/schema.toml", "fedinfer/data/heart_disease/CITATION.md"} <= names
    assert not [name for name in names if name.startswith(("server/", "clients/", "tests/", "experiments/"))]


def test_the_wheel_runs_the_demo_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    inside = home / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(inside)
    # The dependencies come from here; a path file puts them after the wheel's own files, and runs no editable hook.
    (inside / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [str(home / "bin" / "python"), "-m", "fedinfer.cli", "demo", "--fast", "--rounds", "10", "--out", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    where = subprocess.run(
        [
            str(home / "bin" / "python"),
            "-c",
            "import fedinfer, fedinfer_server as s; print(fedinfer.__file__, s.__file__)",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    ).stdout
    assert where.count(str(inside)) == 2
