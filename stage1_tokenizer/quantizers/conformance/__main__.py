"""``python -m stage1_tokenizer.quantizers.conformance TYPE [--config FILE] [--field value ...] [--processes]``.

TYPE is a registered type, whose fields are flags, or ``module:name``: a registered class of one's own, likewise, or what makes a
quantiser when it is called.
Ends with 1 where a check fails.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from intarsia.cli import UserError, parse, run_main
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantizer, QuantizerConfig
from stage1_tokenizer.quantizers.conformance import check

PROGRAM = "python -m stage1_tokenizer.quantizers.conformance"


def find(name: str) -> Callable[[], Quantizer]:
    """What ``module:name`` names. Raises UserError where there is nothing that can be called."""
    module, _, attribute = name.partition(":")
    try:
        made: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{name}: {error}") from None
    if isinstance(made, type) and issubclass(made, QuantizerConfig):
        raise UserError(f"{name}: a configuration; name the class that is registered with it")
    if not callable(made):
        raise UserError(f"{name}: a {type(made).__name__}; expected what makes a quantiser when it is called")
    return made  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0].startswith("-"):
        types = ", ".join(QUANTIZERS.names())
        usage = f"usage: {PROGRAM} TYPE|module:name [--config FILE] [--field value ...] [--processes]; types: {types}"
        if words[:1] not in (["--help"], ["-h"]):
            raise UserError(usage)
        print(usage)
        return
    kind, *words = words
    processes = "--processes" in words
    words = [word for word in words if word != "--processes"]
    subject: QuantizerConfig | Callable[[], Quantizer]
    if ":" in kind:
        subject = find(kind)
        registered = getattr(subject, "type_name", None)
        if isinstance(subject, type) and issubclass(subject, Quantizer) and registered in QUANTIZERS.names():
            subject, _ = parse(QUANTIZERS.config(registered), words, program=f"{PROGRAM} {kind}")
        elif words:
            raise UserError(f"{words[0]}: {kind} takes no fields")
    else:
        subject, _ = parse(QUANTIZERS.config(kind), words, program=f"{PROGRAM} {kind}")
    report = check(subject, processes=processes)
    print(report, flush=True)
    if not report.ok:
        raise SystemExit(1)


if __name__ == "__main__":
    run_main(main)
