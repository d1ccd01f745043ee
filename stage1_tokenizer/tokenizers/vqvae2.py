"""A hierarchy of code grids (VQ-VAE-2, Razavi et al. 2019, arXiv:1906.00446), of any depth."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from intarsia.config import Config
from intarsia.distributed import Comm
from intarsia.rng import StepRng
from intarsia.specs import Cond, LevelSpec, SignalSpec, TokenizerSpec
from stage1_tokenizer.nets.base import NETS, NetConfig
from stage1_tokenizer.nets.blocks import CONV, Norm, Upsampling
from stage1_tokenizer.nets.conv import ConvConfig
from stage1_tokenizer.nets.ladder import Down, GridConfig, Head, Up
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantized, Quantizer, QuantizerConfig, at_least_float32
from stage1_tokenizer.quantizers.composite import joined_likely
from stage1_tokenizer.quantizers.vq import VQConfig
from stage1_tokenizer.tokenizers.base import TOKENIZERS, Tokenizer, TokenizerConfig, TokenizerOutput

RESERVED = ("start", "stop", "shape")  # an option for each level and a guidance schedule are told apart by their keys


class LevelConfig(Config):
    """One level of codes."""

    name: str = ""
    """Of the level, without a slash or a dot; empty = by its place: top, middle, bottom (with more levels middle_1, middle_2, ...)."""
    quantizer: QuantizerConfig = VQConfig()
    """Latents to codes."""


class VQVAE2Config(TokenizerConfig):
    """A net for the finest grid, a ladder to the coarser ones, and a quantiser on each."""

    net: NetConfig = ConvConfig(widths=(96,), blocks=(2,), encoder_blocks=(1,))
    """Encoder and decoder between the signal and the finest grid."""
    ladder: tuple[GridConfig, ...] = (GridConfig(),)
    """The coarser grids, coarse to fine: one for each level but the finest."""
    levels: tuple[LevelConfig, ...] = (LevelConfig(), LevelConfig())
    """The levels, coarse to fine."""
    norm: Norm = "group"
    """Normalisation in the ladder and in the decoders of prefixes."""
    upsample: Upsampling = "transposed"
    """How the ladder and the decoders of prefixes double a grid."""
    conditioned: bool = True
    """A level is quantised given the decoded coarser ones; false: of the encoder's features alone."""
    prefix_blocks: Annotated[int, Field(ge=0)] | None = 1
    """Residual blocks of the small decoder that each prefix of levels has for its own reconstruction, without which coarse levels
    end up carrying nothing; null = no such decoders."""
    drop_finer: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of training samples whose decoder sees only some leading levels, as many as chance says; the others are zeros."""

    def model_post_init(self, context: Any) -> None:
        if len(self.levels) < 2:
            raise ValueError(f"levels: {len(self.levels)}; expected at least two (one level is a vqvae)")
        if len(self.ladder) != len(self.levels) - 1:
            raise ValueError(f"ladder: {len(self.ladder)} grids; expected {len(self.levels) - 1}, one for each level but the finest")
        names = self.names()
        if len(set(names)) != len(names) or any(c in name for name in names for c in "/."):
            raise ValueError(f"levels: names {names}; expected different ones without a slash or a dot")
        if taken := [name for name in names if name in RESERVED]:
            raise ValueError(f"levels: {taken[0]!r} names no level: {', '.join(RESERVED)} are keys of a sampling option in its place")

    def names(self) -> tuple[str, ...]:
        """The levels' names, coarse to fine."""
        middle = ["middle"] if len(self.levels) == 3 else [f"middle_{i}" for i in range(1, len(self.levels) - 1)]
        return tuple(level.name or usual for level, usual in zip(self.levels, ["top", *middle, "bottom"], strict=True))


def _of_level(key: str, name: str) -> str:
    """A scalar of a quantiser, named as the levels are: "perplexity" as "perplexity/top", "perplexity/0" as "perplexity/top/0"."""
    scalar, *depth = key.split("/")
    return "/".join([scalar, name, *depth])


@TOKENIZERS.register("vqvae2", VQVAE2Config)
class VQVAE2(Tokenizer):
    """Levels 0 (coarsest) to N - 1; h_i are encoder features on grid i, q_i quantised latents, c_i what levels below i decode to.

    h_(N-1) = net.encode(x), h_i = down_i(h_(i+1)); q_i = quantiser_i(to_codes_i[h_i, c_i]); j_i = from_codes_i[q_i, c_i];
    c_(i+1) = up_i(j_i) on grid i + 1; the reconstruction is net.decode(j_(N-1)), that of the first i levels head_i(c_i).
    The gradient goes through conditioning and quantisers alike. Each level draws from a stream of its own, ``rng.sub(name)``.

    ``spec.prefixes`` holds what decodes alone: whole levels, and inside of a level the prefixes of its quantiser.
    """

    against_idle_level = "objective.prefix_weight: 0.25 with tokenizer.prefix_blocks, or tokenizer.drop_finer: 0.1"
    config: VQVAE2Config

    def __init__(self, config: VQVAE2Config, signal: SignalSpec) -> None:
        super().__init__(config, signal)
        axes, conv = len(signal.shape), CONV[len(signal.shape)]
        self.names = config.names()
        self.net = NETS.build(config.net, signal)
        self.grids, strides = self._geometry(config)
        widths = [*(grid.width for grid in config.ladder), self.net.width]
        self.quantizers = nn.ModuleList(QUANTIZERS.build(level.quantizer) for level in config.levels)
        maps = [len(quantizer.level_specs("codes", (1,))) for quantizer in self.levels()]
        self.starts = tuple(accumulate(maps, initial=0))  # the number of maps of codes before each level, and of all
        dims = [quantizer.dim for quantizer in self.levels()]
        above = [0, *widths[1:]]  # channels of c_i
        given = [w + (c if config.conditioned else 0) for w, c in zip(widths, above, strict=True)]
        self.to_codes = nn.ModuleList(conv(g, d, 1) for g, d in zip(given, dims, strict=True))
        self.from_codes = nn.ModuleList(conv(d + c, w, 3, padding=1) for d, c, w in zip(dims, above, widths, strict=True))
        self.down = nn.ModuleList(Down(axes, grid, widths[i + 1], config.norm) for i, grid in enumerate(config.ladder))
        self.up = nn.ModuleList(Up(axes, grid, widths[i + 1], config.norm, config.upsample) for i, grid in enumerate(config.ladder))
        self.heads = nn.ModuleList()
        if config.prefix_blocks is not None:
            shared = (signal.channels, config.prefix_blocks, config.norm, config.upsample)
            self.heads.extend(Head(axes, widths[i], strides[i], *shared) for i in range(1, len(widths)))
        self.stride = strides[0]
        self.halo = None

    def _geometry(self, config: VQVAE2Config) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Grids and strides, coarse to fine. Raises ValueError where a factor does not divide the finer grid."""
        grids, strides = [self.net.grid], [self.net.stride]
        for i, grid in reversed(list(enumerate(config.ladder))):
            if any(size % grid.factor for size in grids[0]):
                raise ValueError(f"ladder.{i}: factor {grid.factor} does not divide the finer grid {grids[0]}, signal {self.signal.shape}")
            grids.insert(0, tuple(size // grid.factor for size in grids[0]))
            strides.insert(0, tuple(step * grid.factor for step in strides[0]))
        return grids, strides

    # What it is ------------------------------------------------------------------------------------------------
    @property
    def spec(self) -> TokenizerSpec:
        return TokenizerSpec(self.signal, self.level_specs(), self.fingerprint, self.prefixes())

    def levels(self) -> list[Quantizer]:
        """The quantisers, coarse to fine."""
        return list(self.quantizers)  # type: ignore[arg-type]

    def level_specs(self) -> tuple[LevelSpec, ...]:
        maps = [q.level_specs(name, grid) for q, name, grid in zip(self.levels(), self.names, self.grids, strict=True)]
        return tuple(level for part in maps for level in part)

    def prefixes(self) -> tuple[int, ...]:
        alone = len(self.heads) > 0 or self.config.drop_finer > 0
        found: list[int] = []
        for i, (start, quantizer) in enumerate(zip(self.starts, self.levels(), strict=False)):
            if alone or i == len(self.quantizers) - 1:
                found += [start + count for count in quantizer.prefixes()]
        return tuple(found)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.net.last_layer

    def code_path(self) -> dict[str, nn.Module]:
        """The modules that decide the codes of a signal: with ``conditioned`` also those that decode coarser levels for finer ones."""
        modules: dict[str, nn.Module] = {"net.encoder": self.net.encoder, "down": self.down, "to_codes": self.to_codes}
        if self.config.conditioned:
            modules |= {"up": self.up, "from_codes": self.from_codes[:-1]}
        return modules

    def fingerprint_tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, module in self.code_path().items():
            tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
        for i, quantizer in enumerate(self.levels()):
            tensors |= {f"quantizers.{i}.{key}": tensor for key, tensor in quantizer.code_tensors().items()}
        return tensors

    # The way down and up ---------------------------------------------------------------------------------------
    def _features(self, x: Tensor) -> list[Tensor]:
        """h_i of every grid, coarse to fine."""
        features = [self.net.encode(x)]
        for down in reversed(self.down):
            features.insert(0, down(features[0]))
        return features

    def _latents(self, level: int, features: list[Tensor], above: Tensor | None) -> Tensor:
        """z_e (B, D, *grid) of a level, in float32 or wider; ``above`` is c_i, None for the coarsest."""
        given = features[level]
        if self.config.conditioned and above is not None:
            given = torch.cat([given, above.to(given.dtype)], 1)
        return at_least_float32(self.to_codes[level](given))

    def _join(self, level: int, z: Tensor, above: Tensor | None) -> Tensor:
        """j_i of q_i and c_i."""
        join = self.from_codes[level]
        z = z.contiguous().to(next(join.parameters()).dtype)  # from float32, and channels last, in which group norm is slow on a CPU
        return join(z if above is None else torch.cat([z.to(above.dtype), above], 1))

    def _climb(self, features: list[Tensor], rng: StepRng | None, levels: int) -> tuple[list[Quantized], list[Tensor], Tensor]:
        """Quantises the first ``levels`` levels: what each quantiser gave, c_1, c_2, ..., and j of the last."""
        found: list[Quantized] = []
        above: list[Tensor] = []
        joined = features[0]
        for i, (name, quantizer) in enumerate(zip(self.names[:levels], self.levels(), strict=False)):
            if i:
                above.append(self.up[i - 1](joined))
            given = above[-1] if above else None
            found.append(quantizer(self._latents(i, features, given), None if rng is None else rng.sub(name)))
            joined = self._join(i, found[-1].z, given)
        return found, above, joined

    def _dropped(self, z: list[Tensor], above: Tensor, rng: StepRng | None) -> Tensor:
        """j_(N-1) where a share of the samples keeps only 1 to N - 1 leading levels. ``z`` are the q_i, ``above`` is c_1."""
        if rng is None:
            raise ValueError("rng: a StepRng is needed in training while drop_finer > 0")
        draw = rng.sub("drop_finer").uniform("levels", 2).to(z[0].device)
        kept = 1 + (draw[:, 1] * (len(z) - 1)).long()
        kept = torch.where(draw[:, 0] < self.config.drop_finer, kept, len(z))
        joined = z[0]
        for i in range(1, len(z)):
            above = self.up[i - 1](joined) if i > 1 else above
            joined = self._join(i, z[i] * (kept > i).view(-1, *[1] * (z[i].ndim - 1)).to(z[i].dtype), above)
        return joined

    # Training --------------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, cond: Cond | None = None, rng: StepRng | None = None) -> TokenizerOutput:
        if cond is not None:
            raise ValueError("cond: VQVAE2 has no use for a condition")
        found, above, joined = self._climb(self._features(x), rng, len(self.names))
        prefixes = tuple((self.starts[i + 1], head(above[i])) for i, head in enumerate(self.heads))
        if self.training and self.config.drop_finer > 0:
            joined = self._dropped([q.z for q in found], above[0], rng)
        stats = {_of_level(key, name): value for name, q in zip(self.names, found, strict=True) for key, value in q.stats.items()}
        codes = tuple(code for q in found for code in q.codes)
        loss = torch.stack([q.loss for q in found]).sum()
        return TokenizerOutput(self.net.decode(joined), codes, loss, stats, prefixes, joined_likely(found))

    @torch.no_grad()
    def initialize(self, batches: Iterable[Tensor], rng: StepRng, comm: Comm) -> None:
        kept = list(batches)
        for i, (name, quantizer) in enumerate(zip(self.names, self.levels(), strict=True)):
            parts = [self._level_latents(i, x).movedim(1, -1).reshape(-1, quantizer.dim) for x in kept]
            rows = torch.cat(parts) if parts else torch.zeros(0, quantizer.dim, device=self.device, dtype=self.dtype)
            quantizer.initialize(comm.gather_rows(rows), rng.sub(name))
            quantizer.as_on_rank_0(comm)

    @torch.no_grad()
    def reestimate(self, batches: Iterable[tuple[Tensor, StepRng]], comm: Comm) -> None:
        kept = list(batches)
        self.discard()
        was_training = self.training
        for i, (name, quantizer) in enumerate(zip(self.names, self.levels(), strict=True)):
            latents = [(self._level_latents(i, x), rng.sub(name)) for x, rng in kept]
            self.train()
            for number in range(quantizer.passes):
                for z, rng in latents:
                    quantizer(z, rng)
                quantizer.reestimate(comm, number)
        self.train(was_training)

    def _level_latents(self, level: int, x: Tensor) -> Tensor:
        """z_e of one level, given the coarser codebooks as they are; no statistics are touched."""
        was_training = self.training
        self.eval()
        features = self._features(x)
        above = None if level == 0 else self.up[level - 1](self._climb(features, None, level)[2])
        self.train(was_training)
        return self._latents(level, features, above)

    def update(self, rng: StepRng, comm: Comm) -> dict[str, Tensor]:
        stats: dict[str, Tensor] = {}
        for name, quantizer in zip(self.names, self.levels(), strict=True):
            stats |= {_of_level(key, name): value for key, value in quantizer.update(rng.sub(name), comm).items()}
        return stats

    def discard(self) -> None:
        for quantizer in self.levels():
            quantizer.discard()

    def finite(self) -> Tensor:
        return torch.stack([quantizer.finite().to(self.device) for quantizer in self.levels()]).all()

    # Use -------------------------------------------------------------------------------------------------------
    def _encode(self, x: Tensor) -> tuple[Tensor, ...]:
        found, _, _ = self._climb(self._features(x), None, len(self.names))
        return tuple(code for q in found for code in q.codes)

    def _decode(self, codes: tuple[Tensor, ...], cond: Any) -> Tensor:
        """All maps of codes, or a prefix of them: then the last level that has any may be decoded from some of its maps."""
        last = next(i for i in range(len(self.names)) if len(codes) <= self.starts[i + 1])
        joined = codes[0]
        above: Tensor | None = None
        for i, quantizer in enumerate(self.levels()):
            above = self.up[i - 1](joined) if i else None
            if i > last and len(self.heads):
                assert above is not None
                return self.heads[last](above)
            if i <= last:
                z = quantizer.decode(codes[self.starts[i] : self.starts[i + 1]]).to(self.dtype)
            else:
                assert above is not None
                z = above.new_zeros(above.shape[0], quantizer.dim, *above.shape[2:])
            joined = self._join(i, z, above)
        return self.net.decode(joined)
