"""The list of checks, and how they are run: in order, and none whose ground another one has already taken away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from stage1_tokenizer.quantizers.conformance.report import Outcome, Report, Skipped, Violation
from stage1_tokenizer.quantizers.conformance.subject import Subject

Run = Callable[[Subject], str | None]


@dataclass(frozen=True)
class Check:
    """One promise.

    Attributes:
        run: returns what it leaves out (or None), raises Violation or Skipped.
        needs: checks without which this one would only repeat their failure.
    """

    name: str
    run: Run
    needs: tuple[str, ...]

    @property
    def promise(self) -> str:
        """The promise in words: the docstring's first line."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


CHECKS: dict[str, Check] = {}


def conformance(*needs: str) -> Callable[[Run], Run]:
    """Decorator: adds a function to the kit under its own name."""

    def add(run: Run) -> Run:
        name = run.__name__
        unknown = [need for need in needs if need not in CHECKS]
        if name in CHECKS or unknown:
            raise ValueError(f"conformance check {name!r}: is there already, or needs unknown ones: {unknown}")
        CHECKS[name] = Check(name, run, needs)
        return run

    return add


def run_checks(subject: Subject, only: tuple[str, ...] = ()) -> Report:
    """All checks (or ``only`` some, with what they need) in their order."""
    wanted = _closure(only) if only else set(CHECKS)
    outcomes: dict[str, Outcome] = {}
    for name, check in CHECKS.items():
        if name in wanted:
            broken = [need for need in check.needs if outcomes[need].status == "failed" or outcomes[need].note.startswith("not judged")]
            if broken:
                outcomes[name] = Outcome(name, "skipped", f"not judged: needs {', '.join(broken)}")
            else:
                outcomes[name] = _outcome(check, subject)
    return Report(subject.name, tuple(outcomes.values()))


def _outcome(check: Check, subject: Subject) -> Outcome:
    try:
        return Outcome(check.name, "passed", check.run(subject) or "")
    except Skipped as reason:
        return Outcome(check.name, "skipped", str(reason))
    except Violation as reason:
        return Outcome(check.name, "failed", _line(str(reason)))
    except Exception as error:  # whatever the class under test raises is an outcome, not the end of the kit
        return Outcome(check.name, "failed", _line(f"{type(error).__name__}: {error}"))


def _line(text: str) -> str:
    first = next(iter(text.strip().splitlines()), "")
    return first if len(first) <= 160 else first[:157] + "..."


def _closure(names: tuple[str, ...]) -> set[str]:
    unknown = [name for name in names if name not in CHECKS]
    if unknown:
        raise ValueError(f"checks: {unknown[0]!r} is none; known: {', '.join(CHECKS)}")
    found = set(names)
    for name in names:
        found |= _closure(CHECKS[name].needs)
    return found
