"""What an audit runs, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedinfer.auditing.subjects import Subject
from fedinfer.privacy import NoiseStream

# A fresh noise stream each time that it is called: another run, another device.
Streams = Callable[[], NoiseStream]

# A test fails an honest subject with at most this probability. There are at most twelve of chance for a subject.
ERROR = 5e-8
SHOWN_ERROR = 0.05


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much an audit runs.

    `canaries` and `runs`: of each world of the two-run game. `whole_runs`: of each world of the game whose score is of
    a whole run. `one_run`: canaries of the one-run audit. `noise_steps`: releases of 4,001 numbers, four times.
    """

    canaries: int
    runs: int
    whole_runs: int
    one_run: int
    noise_steps: int

    def fitted(self, subject: Subject) -> "Size":
        """Fewer canaries where each costs a message in each step."""
        if not subject.slow:
            return self
        return replace(
            self,
            canaries=self.canaries // 6,
            runs=max(3, self.runs // 5),
            one_run=self.one_run // 4,
            noise_steps=max(2, self.noise_steps // 2),
        )


QUICK = Size(canaries=250, runs=10, whole_runs=240, one_run=2000, noise_steps=13)
FULL = Size(canaries=250, runs=100, whole_runs=2000, one_run=4000, noise_steps=50)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one audit found: `passed` is None where it does not apply."""

    audit: str
    passed: bool | None
    figure: str
    says: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All findings about one subject."""

    subject: str
    unit: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return all(finding.passed is not False for finding in self.findings)


def number(value: float) -> str:
    """A figure as the table shows it."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0e}"
