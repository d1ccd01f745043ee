"""What the kit says: one outcome per check, in order, with the reason of every failure and every skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class Violation(AssertionError):
    """A promise that the quantiser breaks."""


class Skipped(Exception):
    """A check that says nothing about this quantiser, and why."""


@dataclass(frozen=True)
class Outcome:
    """One check.

    Attributes:
        note: why it failed or was skipped; for a pass, what it leaves out.
    """

    check: str
    status: Literal["passed", "failed", "skipped"]
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All outcomes for one quantiser; printing it shows them."""

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the failed checks."""
        return tuple(outcome.check for outcome in self.outcomes if outcome.status == "failed")

    @property
    def skipped(self) -> dict[str, str]:
        """Check -> why it says nothing."""
        return {outcome.check: outcome.note for outcome in self.outcomes if outcome.status == "skipped"}

    def __str__(self) -> str:
        width = max(len(outcome.check) for outcome in self.outcomes)
        lines = [f"{o.status:<7} {o.check:<{width}} {o.note}".rstrip() for o in self.outcomes]
        counts = {status: sum(o.status == status for o in self.outcomes) for status in ("passed", "failed", "skipped")}
        return "\n".join([self.subject, *lines, ", ".join(f"{n} {status}" for status, n in counts.items())])
