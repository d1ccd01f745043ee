"""Pipelines small enough to sample hundreds of images in a test: one level with either prior, and two levels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intarsia.distributed import comm
from intarsia.rng import StepRng
from intarsia.specs import CodesSpec, LevelSpec, SignalSpec, TokenizerSpec
from pipelines import TwoStagePipeline
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig
from stage1_tokenizer.tokenizers.vqvae import VQVAE, VQVAEConfig
from stage2_prior.priors.base import Prior
from stage2_prior.priors.gpt import GPTConfig, GPTPrior
from stage2_prior.priors.pixelcnn import PixelCNNConfig, PixelCNNPrior

CLASSES, COUNTS = ("shoe", "bag", "Shirt", "dress"), (10, 20, 30, 0)


class LadderConfig(TokenizerConfig):
    """Two levels of nearest vectors, over patches of 4 x 4 and 2 x 2 pixels."""


class Ladder(Tokenizer):
    """Top codes stand for the means of 4 x 4 pixels, bottom codes for those of 2 x 2 that the top leaves; the top decodes alone."""

    type_name = "ladder"
    config: LadderConfig
    halo = 1
    stride = (4, 4)

    def __init__(self, config: LadderConfig, signal: SignalSpec) -> None:
        super().__init__(config, signal)
        self.top, self.bottom = (nn.Parameter(torch.linspace(-width, width, count)) for width, count in ((0.8, 5), (0.3, 7)))

    def level_specs(self) -> tuple[LevelSpec, ...]:
        height, width = self.signal.shape
        return (LevelSpec("top", 5, (height // 4, width // 4)), LevelSpec("bottom", 7, (height // 2, width // 2)))

    def prefixes(self) -> tuple[int, ...]:
        return (1, 2)

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(self.signal, self.level_specs(), self.fingerprint, self.prefixes())

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        top = (F.avg_pool2d(x, 4)[:, 0, ..., None] - self.top).abs().argmin(-1)
        rest = F.avg_pool2d(x - self._decode((top,), None), 2)[:, 0, ..., None]
        return top, (rest - self.bottom).abs().argmin(-1)

    def _decode(self, codes: tuple[Tensor, ...], cond: Any) -> Tensor:
        tables = zip((self.top, self.bottom), codes, (4, 2), strict=False)
        return torch.stack([table[c].repeat_interleave(f, 1).repeat_interleave(f, 2) for table, c, f in tables]).sum(0)[:, None]


def register_ladder() -> None:
    TOKENIZERS.register("ladder", LadderConfig)(Ladder)


def unregister_ladder() -> None:
    """So that tests over the whole registry do not meet it."""
    del TOKENIZERS._classes["ladder"], TOKENIZERS._configs["ladder"]


def tokenizer(seed: int = 0) -> VQVAE:
    """8 x 8 grey pixels, 4 x 4 codes of 16."""
    torch.manual_seed(seed)
    config = VQVAEConfig(net=ConvConfig(widths=(4, 8), blocks=(0, 0), encoder_blocks=None, patch=1), quantizer=VQConfig(codes=16, dim=4))
    made = VQVAE(config, SignalSpec("image", 1, (8, 8)))
    made.initialize([torch.rand(64, 1, 8, 8) * 2 - 1], StepRng(0, 0, torch.arange(64)), comm)
    return made.eval()


def codes_spec(tokenizer: Tokenizer, labelled: bool = True) -> CodesSpec:
    return CodesSpec(tokenizer.level_specs(), tokenizer.fingerprint, *((CLASSES, COUNTS) if labelled else ()))


def prior(kind: str, spec: CodesSpec, levels: str = "", **config: Any) -> Prior:
    """Fresh weights, but sure of itself: logits are far from uniform, and depend on the label."""
    torch.manual_seed(1)
    made: Prior
    if kind == "gpt":
        made = GPTPrior(GPTConfig(levels=levels, width=16, depth=1, heads=2, **config), spec)
    else:
        made = PixelCNNPrior(PixelCNNConfig(levels=levels, width=8, depth=2, **config), spec)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return made.eval()


def pipeline(kind: str = "gpt", labelled: bool = True, **settings: Any) -> TwoStagePipeline:
    """ "gpt", "pixelcnn" or "ladder" (two levels, GPT over PixelCNN; needs ``register_ladder``)."""
    if kind == "ladder":
        tok: Tokenizer = Ladder(LadderConfig(), SignalSpec("image", 1, (8, 8)))
        spec = codes_spec(tok, labelled)
        return TwoStagePipeline(tok, [prior("gpt", spec, "0:1"), prior("pixelcnn", spec, "1:2")], **settings)
    tok = tokenizer()
    return TwoStagePipeline(tok, [prior(kind, codes_spec(tok, labelled))], **settings)
