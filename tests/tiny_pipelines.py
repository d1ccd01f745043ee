"""Pipelines small enough to sample hundreds of images in a test: one level with any prior, two levels, three levels.

Test modules that use the ladders import ``ladders`` (a fixture of the whole module).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
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
from stage2_prior.priors.maskgit import MaskGITConfig, MaskGITPrior
from stage2_prior.priors.pixelcnn import PixelCNNConfig, PixelCNNPrior

CLASSES, COUNTS = ("shoe", "bag", "Shirt", "dress"), (10, 20, 30, 0)


class LadderConfig(TokenizerConfig):
    """Levels of nearest numbers, over patches of 4 x 4, 2 x 2 and single pixels."""

    levels: int = 2
    """2 or 3."""


class Ladder(Tokenizer):
    """Top codes stand for the means of 4 x 4 pixels, lower ones for those of smaller patches that the levels above leave; leading
    levels decode alone."""

    type_name = "ladder"
    config: LadderConfig
    halo = 1
    stride = (4, 4)
    NAMES, VOCABS, PATCHES, WIDTHS = ("top", "bottom", "finest"), (5, 7, 3), (4, 2, 1), (0.8, 0.3, 0.1)

    def __init__(self, config: LadderConfig, signal: SignalSpec) -> None:
        super().__init__(config, signal)
        for name, vocab, width in list(zip(self.NAMES, self.VOCABS, self.WIDTHS, strict=True))[: config.levels]:
            self.register_parameter(name, nn.Parameter(torch.linspace(-width, width, vocab)))

    def level_specs(self) -> tuple[LevelSpec, ...]:
        height, width = self.signal.shape
        specs = [LevelSpec(n, v, (height // f, width // f)) for n, v, f in zip(self.NAMES, self.VOCABS, self.PATCHES, strict=True)]
        return tuple(specs[: self.config.levels])

    def prefixes(self) -> tuple[int, ...]:
        return tuple(range(1, self.config.levels + 1))

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(self.signal, self.level_specs(), self.fingerprint, self.prefixes())

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        codes: tuple[Tensor, ...] = ()
        for name, patch in zip(self.NAMES[: self.config.levels], self.PATCHES, strict=False):
            rest = x - self._decode(codes, None) if codes else x
            codes += ((F.avg_pool2d(rest, patch)[:, 0, ..., None] - self.get_parameter(name)).abs().argmin(-1),)
        return codes

    def _decode(self, codes: tuple[Tensor, ...], cond: Any) -> Tensor:
        layers = zip(self.NAMES, codes, self.PATCHES, strict=False)
        return torch.stack([self.get_parameter(n)[c].repeat_interleave(f, 1).repeat_interleave(f, 2) for n, c, f in layers]).sum(0)[:, None]


class TokensConfig(TokenizerConfig):
    """A row of four tokens over an image."""


class Tokens(Tokenizer):
    """Token i stands for the mean of the i-th quarter of the rows of an 8 x 8 image: one axis over a signal of two. Buffers alone."""

    type_name = "tokens"
    config: TokensConfig
    halo = None
    stride = (8, 8)
    values: Tensor

    def __init__(self, config: TokensConfig, signal: SignalSpec) -> None:
        super().__init__(config, signal)
        self.register_buffer("values", torch.linspace(-0.8, 0.8, 6))

    def level_specs(self) -> tuple[LevelSpec, ...]:
        return (LevelSpec("tokens", 6, (4,)),)

    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(self.signal, self.level_specs(), self.fingerprint, (1,))

    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return ((x.view(len(x), 4, 16).mean(2)[..., None] - self.values).abs().argmin(-1),)

    def _decode(self, codes: tuple[Tensor, ...], cond: Any) -> Tensor:
        return self.values[codes[0]].repeat_interleave(16, 1).view(-1, 1, 8, 8)


def tokens(kind: str) -> TwoStagePipeline:
    """A type of prior over a row of tokens (needs ``register_ladder``)."""
    tok = Tokens(TokensConfig(), SignalSpec("image", 1, (8, 8)))
    return TwoStagePipeline(tok, [prior(kind, codes_spec(tok))], micro_batch=8)


def register_ladder() -> None:
    TOKENIZERS.register("ladder", LadderConfig)(Ladder)
    TOKENIZERS.register("tokens", TokensConfig)(Tokens)


def unregister_ladder() -> None:
    """So that tests over the whole registry do not meet it."""
    for name in ("ladder", "tokens"):
        del TOKENIZERS._classes[name], TOKENIZERS._configs[name]


@pytest.fixture(autouse=True, scope="module")
def ladders() -> Iterator[None]:
    """The ladders, and the row of tokens, are registered while the tests of a module run."""
    register_ladder()
    yield
    unregister_ladder()


@pytest.fixture(scope="module")
def gpt(ladders: None) -> TwoStagePipeline:
    return pipeline("gpt", micro_batch=8)


@pytest.fixture(scope="module")
def ladder(ladders: None) -> TwoStagePipeline:
    return pipeline("ladder", micro_batch=8)


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
    elif kind == "maskgit":
        made = MaskGITPrior(MaskGITConfig(levels=levels, width=16, depth=1, heads=2, **config), spec)
    else:
        made = PixelCNNPrior(PixelCNNConfig(levels=levels, width=8, depth=2, **config), spec)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return made.eval()


STACKS = {
    "ladder": ("gpt 0:1", "pixelcnn 1:2"),
    "top pixelcnn": ("pixelcnn 0:1", "maskgit 1:2"),
    "joint": ("gpt 0:2",),
    "parallel": ("maskgit 0:1", "maskgit 1:2"),
    "joint parallel": ("maskgit 0:2",),
    "three": ("gpt 0:1", "pixelcnn 1:2", "maskgit 2:3"),
    "three parallel": ("maskgit 0:2", "maskgit 2:3"),
}


def pipeline(kind: str = "gpt", labelled: bool = True, **settings: Any) -> TwoStagePipeline:
    """A type of prior over one level, or a key of ``STACKS``: priors over the levels of a ladder (needs ``register_ladder``)."""
    if kind in STACKS:
        tok: Tokenizer = Ladder(LadderConfig(levels=3 if "three" in kind else 2), SignalSpec("image", 1, (8, 8)))
        spec = codes_spec(tok, labelled)
        return TwoStagePipeline(tok, [prior(type_, spec, levels) for type_, levels in map(str.split, STACKS[kind])], **settings)
    tok = tokenizer()
    return TwoStagePipeline(tok, [prior(kind, codes_spec(tok, labelled))], **settings)
