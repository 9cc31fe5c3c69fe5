"""Imports point down, and the big dependencies have owners."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors",),
    ("arrays", "wire", "files"),
    ("data", "models", "privacy", "secagg", "encrypted", "inference"),
    ("rules", "combiners"),
    ("settings",),
    ("card",),
    ("algorithms", "optimisers", "local_app"),
    ("local_task",),
    ("training",),
    ("evaluating", "counting"),
    ("flower",),
    ("sums",),
    ("simulation",),
    ("auditing", "report"),
    ("clients", "server"),
    ("cli",),
    ("experiments",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SIDEWAYS = {("encrypted", "models"), ("inference", "models")}
OWNERS = {
    "flwr": {
        "auditing/flower_peer.py",
        "flower",
        "sums",
        "local_app.py",
        "simulation",
        "server",
        "clients/app.py",
        "cli/train.py",
    },
    "tenseal": {"encrypted/seal.py"},
    "opacus": {"auditing/opacus_peer.py"},
    "dp_accounting": {"privacy/accounting.py"},
    "sqlite3": {"privacy/ledger_store.py"},
}


def sources() -> Iterator[tuple[str, Path]]:
    """Each source file with the name of its part."""
    for path in sorted((ROOT / "fedinfer").rglob("*.py")):
        if path.parent != ROOT / "fedinfer" or path.name != "__init__.py":
            yield path.relative_to(ROOT / "fedinfer").parts[0].removesuffix(".py"), path
    for folder in ("clients", "server", "experiments"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield folder, path


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Each imported module by its full name, with the number of leading dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def part_of(module: str) -> str | None:
    """The part that an absolute import names, or None for somebody else's package."""
    first, *rest = module.split(".")
    if first == "fedinfer":
        return rest[0] if rest else None
    return first.removeprefix("fedinfer_") if first.removeprefix("fedinfer_") in ("clients", "server") else None


def broken(part: str, path: Path) -> Iterator[str]:
    """What is wrong with the imports of one file."""
    for module, dots in imports(path):
        if dots:
            if part not in ("clients", "server"):
                yield f"{path}: a relative import outside clients/ and server/"
            continue
        other = part_of(module)
        if other is None or other == part:
            if other in ("clients", "server"):
                yield f"{path}: {module} imported by its own folder, expected a relative import"
            continue
        if other in ("clients", "server") and part == "cli":
            yield f"{path}: {module} imported directly, expected cli/parts.py"
        if RANK[other] >= RANK[part] and (part, other) not in SIDEWAYS:
            yield f"{path}: {part} imports {other}, which does not lie below it"


def test_every_part_has_a_layer() -> None:
    assert {part for part, _ in sources()} - set(RANK) == set()


def test_imports_point_down() -> None:
    assert [line for part, path in sources() for line in broken(part, path)] == []


def test_big_dependencies_have_owners() -> None:
    strangers = []
    for part, path in sources():
        if part == "experiments":
            continue
        place = path.relative_to(ROOT).as_posix().removeprefix("fedinfer/")
        for module, _ in imports(path):
            owners = OWNERS.get(module.split(".")[0])
            if owners is not None and not any(
                place == o or place == f"{o}.py" or place.startswith(f"{o}/") for o in owners
            ):
                strangers.append(f"{place}: {module}")
    assert strangers == []


def test_the_rule_sees_an_upward_import(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from fedinfer.cli import main\n", encoding="utf-8")
    assert len(list(broken("privacy", wrong))) == 1
    wrong.write_text("from fedinfer.data import Row\n", encoding="utf-8")
    assert len(list(broken("privacy", wrong))) == 1
    wrong.write_text("import server.app\n", encoding="utf-8")
    assert len(list(broken("clients", wrong))) == 1


def test_nothing_needs_a_place_outside_the_project() -> None:
    forbidden = ("../" + "shared", "/" + "root/", "/" + "work/")
    named = [
        f"{path}: {word}"
        for folder in ("fedinfer", "clients", "server", "experiments", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".md", ".toml"}
        for word in forbidden
        if word in path.read_text(encoding="utf-8")
    ]
    assert named == []


def test_files_named_in_comments_exist() -> None:
    name = re.compile(r"\b(?:fedinfer|clients|server|experiments|tests)/[\w/]+\.py\b")
    missing = [
        f"{path}: {found}"
        for folder in ("fedinfer", "clients", "server", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        for found in name.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / found).exists()
    ]
    assert missing == []
