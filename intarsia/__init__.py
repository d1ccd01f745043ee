"""What both stages of Intarsia stand on: configuration, registries, specs, randomness, codes on disk, runs."""

from intarsia.codes import CodesDataset, write_codes
from intarsia.distributed import comm
from intarsia.order import Order
from intarsia.rng import StepRng, uniform
from intarsia.specs import CodesSpec, Cond, LevelSpec, SignalSpec, TokenizerSpec

__all__ = [
    "CodesDataset",
    "CodesSpec",
    "Cond",
    "LevelSpec",
    "Order",
    "SignalSpec",
    "StepRng",
    "TokenizerSpec",
    "comm",
    "uniform",
    "write_codes",
]
