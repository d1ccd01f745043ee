"""The conformance kit on somebody else's layers: those of vector-quantize-pytorch (pip install vector-quantize-pytorch).

The adapter is two functions per layer. A layer whose codebook moves in its forward fails ``forward_is_pure``, and most checks have
nothing to stand on then; the same layer with its codebook frozen is therefore checked beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
import vector_quantize_pytorch as vqp
from torch import Tensor

from stage1_tokenizer.quantizers.conformance import Adapter, Report, Traits, check, nearest_code

K, D = 16, 4
VQ: dict[str, Any] = {"dim": D, "codebook_size": K, "decay": 0.8, "commitment_weight": 0.25, "rotation_trick": False}
Maps = tuple[Tensor, ...]


def one_map(layer: Any, z: Tensor) -> tuple[Tensor, Maps, Tensor]:
    z_q, codes, *loss = layer(z)
    return z_q, (codes.long(),), loss[0].sum() if loss else z.new_zeros(())


def several_maps(layer: Any, z: Tensor) -> tuple[Tensor, Maps, Tensor]:
    z_q, codes, loss = layer(z, freeze_codebook=True)
    return z_q, codes.long().unbind(-1), loss.sum()


def from_vectors(layer: Any, codes: Maps) -> Tensor:
    vectors: Tensor = layer.get_codes_from_indices(codes[0])
    return vectors


def from_stages(layer: Any, codes: Maps) -> Tensor:
    vectors: Tensor = layer.get_output_from_indices(torch.stack(codes, -1))
    return vectors


def from_values(layer: Any, codes: Maps) -> Tensor:
    vectors: Tensor = layer.indices_to_codes(codes[0])
    return vectors


def vq(**options: Any) -> Callable[[], Adapter]:
    return lambda: Adapter(vqp.VectorQuantize(**VQ, **options), D, (K,), one_map, from_vectors)


def residual() -> Adapter:
    return Adapter(vqp.ResidualVQ(num_quantizers=2, **VQ), D, (K, K), several_maps, from_stages)


NEAREST = nearest_code(beta=0.25, codebook=0.0)
THROUGH = Traits(surrogate=lambda _, z: z)
LAYERS: dict[str, tuple[Callable[[], Adapter], Traits]] = {
    "VectorQuantize": (vq(), NEAREST),
    "VectorQuantize, frozen": (vq(freeze_codebook=True), NEAREST),
    "VectorQuantize, k-means, restarts": (vq(kmeans_init=True, threshold_ema_dead_code=2), replace(NEAREST, restart=True)),
    "ResidualVQ, 2 stages, frozen": (residual, THROUGH),
    "FSQ, levels 8 6 5": (lambda: Adapter(vqp.FSQ(levels=[8, 6, 5]), 3, (240,), one_map, from_values), Traits()),
    "LFQ, 6 bits": (lambda: Adapter(vqp.LFQ(dim=6, codebook_size=64), 6, (64,), one_map, from_values), THROUGH),
    "SimVQ": (lambda: Adapter(vqp.SimVQ(dim=D, codebook_size=K, rotation_trick=False), D, (K,), one_map, from_values), THROUGH),
}


def report(name: str) -> Report:
    """The kit's report on one of LAYERS. They decide when they are built whether they synchronise ranks: that is not judged."""
    make, promised = LAYERS[name]
    traits = replace(promised, active=False, wide=False, ranks=False)
    return check(make, traits=traits, name=f"{name} (vector-quantize-pytorch {version('vector-quantize-pytorch')})")


def main(*names: str) -> None:
    for name in names or LAYERS:
        print(report(name), end="\n\n", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
