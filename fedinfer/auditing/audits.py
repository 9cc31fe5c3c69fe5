"""All audits of one subject, in the order of the table.

A test fails an honest subject with probability at most `ERROR`, and there are at most twelve of chance: less than 1e-6
a subject. Figures are bounds at 95 %; one that is above the claim fails only if it is so at `ERROR` too.
"""

from collections.abc import Callable, Iterator, Mapping

from fedinfer.auditing.checks import audit_clip_rule, audit_neighbours, audit_noise, audit_sampling, audit_size
from fedinfer.auditing.findings import Finding, Size, Streams
from fedinfer.auditing.games import audit_one_run, audit_two_runs, audit_whole_runs
from fedinfer.auditing.subjects import Subject

AUDITS: Mapping[str, Callable[[Subject, Size, Streams], Finding]] = {
    "neighbours": audit_neighbours,
    "public size": audit_size,
    "noise": audit_noise,
    "sampling": audit_sampling,
    "two runs": audit_two_runs,
    "whole runs": audit_whole_runs,
    "one run": audit_one_run,
    "adaptive clip": audit_clip_rule,
}


def audit(subject: Subject, size: Size, streams: Streams) -> Iterator[Finding]:
    """Run every audit; `streams` gives a fresh noise stream each time that it is called."""
    for each in AUDITS.values():
        yield each(subject, size.fitted(subject), streams)
