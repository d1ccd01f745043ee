"""The conformance kit: what every quantiser of this library promises, as checks that anyone can run on a class of their own.

```python
from stage1_tokenizer.quantizers.conformance import check, nearest_code
print(check(lambda: MyQuantizer(codes=64, dim=8), traits=nearest_code(beta=0.25, codebook=0.0, ema=0.99)))
```
On the command line: ``python -m stage1_tokenizer.quantizers.conformance vq --codes 64 --dim 8``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantizer, QuantizerConfig
from stage1_tokenizer.quantizers.conformance import losses, restarts  # noqa: F401  with what they import, they fill CHECKS
from stage1_tokenizer.quantizers.conformance.adapter import Adapter
from stage1_tokenizer.quantizers.conformance.kit import CHECKS, run_checks
from stage1_tokenizer.quantizers.conformance.known import traits_of
from stage1_tokenizer.quantizers.conformance.report import Outcome, Report
from stage1_tokenizer.quantizers.conformance.subject import Subject
from stage1_tokenizer.quantizers.conformance.traits import Choice, Traits, nearest_code, table_of

__all__ = ["CHECKS", "Adapter", "Choice", "Outcome", "Report", "Traits", "check", "nearest_code", "table_of", "traits_of"]


def check(
    subject: Quantizer | QuantizerConfig | Callable[[], Quantizer],
    *,
    traits: Traits | None = None,
    only: tuple[str, ...] = (),
    processes: bool = False,
    name: str = "",
) -> Report:
    """Runs the kit.

    Args:
        subject: a quantiser (copies of it are used; best one that is not initialised yet), the configuration of one, or what
            makes one when it is called.
        traits: what it promises beyond the interface; that of a registered type is known.
        only: the names of some checks; those that they need run too.
        processes: two ranks are forked processes that gloo joins, instead of threads.
        name: for the report.

    Raises:
        ValueError: where ``only`` names no check, or what is given or made is no Quantizer with a ``dim`` and ``level_specs``. What the
            class under test raises beyond that is an outcome, but for its constructor.
    """
    if isinstance(subject, Quantizer):
        original = subject
        make: Callable[[], Quantizer] = lambda: copy.deepcopy(original)
    elif isinstance(subject, QuantizerConfig):
        config = subject
        make = lambda: QUANTIZERS.build(config)
    else:
        make = subject
    first = make()
    if not isinstance(first, Quantizer):
        raise ValueError(f"subject: a {type(first).__name__}; expected a Quantizer. A layer of another interface goes into an Adapter")
    known = traits_of(first) if traits is None else traits
    name = name or f"{type(first).__name__}({first.extra_repr()})"
    return run_checks(Subject(name, make, known, processes, copies=isinstance(subject, Quantizer)), only)
