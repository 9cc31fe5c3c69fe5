"""The table of robust rules prints, and its differences are paired."""

import json
import math
from pathlib import Path

import pytest

from experiments import robust_rules
from fedinfer.combiners import COMBINERS


@pytest.mark.long
def test_robust_rules_compare_with_the_mean_that_nobody_attacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    robust_rules.main(["--quick", "--json", str(tmp_path / "table.json")])
    result = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    rows = {(row["epsilon"], row["attack"], row["rule"]): row for row in result["rows"]}
    assert len(rows) == 2 * 2 * len(COMBINERS)
    for epsilon in (None, 2.0):
        plain = rows[epsilon, "nobody", "mean"]
        assert (plain["difference"], plain["standard_error"]) == (0.0, 0.0)
        broken = rows[epsilon, "flipped, 10 times", "mean"]
        assert math.isclose(broken["difference"], broken["unsafe_auc_mean"] - plain["unsafe_auc_mean"], abs_tol=1e-9)
    assert set(result["seconds"]) == set(COMBINERS)
    assert "its own noise" in capsys.readouterr().out
