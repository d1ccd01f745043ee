"""MaskGIT: a transformer that sees to all sides, fills in masked codes, and so draws many of them in one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from intarsia.config import Place
from intarsia.inference import inference
from intarsia.rng import StepRng, uniform
from intarsia.specs import CodesSpec, Cond
from stage2_prior.context import Context, ContextEncoder, embedding
from stage2_prior.decoding import MaskGITOptions, decode
from stage2_prior.heads import Logits
from stage2_prior.layout import Layout
from stage2_prior.masking import Schedule, masked_count, masked_places
from stage2_prior.packed import packed
from stage2_prior.priors.base import PRIORS, Known, Prior, PriorConfig, Stats, bits
from stage2_prior.priors.maskgit_steps import Predictor
from stage2_prior.sampling import DrawOptions
from stage2_prior.transformer import Rotary, Transformer, rotary_tables


class MaskGITConfig(PriorConfig):
    """MaskGIT over the codes of its levels."""

    width: Annotated[int, Field(ge=1)] = 128
    """Features of the trunk; a multiple of heads."""
    depth: Annotated[int, Field(ge=1)] = 6
    """Blocks."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads."""
    positions: Literal["learned", "rotary"] = "learned"
    """A learned vector for each position, or rotary positions over the axes of the grid."""
    schedule: Schedule = "cosine"
    """How training draws the share of masked codes, and how sampling lowers it where it is not told."""
    nll_samples: Place[Annotated[int, Field(ge=1)]] = 4
    """Forward passes per level of an estimate of the bound: its variance falls faster than one over their number."""


@PRIORS.register("maskgit", MaskGITConfig)
class MaskGITPrior(Prior):
    """Chang et al. 2022 (arXiv:2202.04200), level by level, coarse first: a level is filled in given all levels above it, which
    are known in full, its own or not; the levels below it are not there yet.

    Training fills in every level in each step, each from its own masks: no level waits for its turn, and every parameter gets a
    gradient. That costs one pass over each level with those above it.
    """

    config: MaskGITConfig
    nll_is_bound: ClassVar[bool] = True
    Options: ClassVar[type[DrawOptions]] = MaskGITOptions

    def __init__(self, config: MaskGITConfig, spec: CodesSpec) -> None:
        super().__init__(config, spec)
        width = config.width
        self.layout = Layout(self.own)
        classes = len(spec.classes) if self.conditional else 0
        self.context = ContextEncoder(self.layout, self.upper, width, classes, self.has_null, config.positions == "learned")
        self.codes = nn.ModuleList(embedding(level.vocab + 1, width, 0.5) for level in self.own)  # the last row: masked
        self.trunk = Transformer(width, config.depth, config.heads, causal=False)
        self.heads = nn.ModuleList(Logits(width, level.vocab) for level in self.own)
        if config.positions == "rotary":  # refuses heads that are too small
            rotary_tables(torch.zeros(1, len(self.own[0].shape), dtype=torch.float64, device="cpu"), width // config.heads)
        self._tables: dict[torch.device, Rotary] = {}

    @property
    def tables(self) -> Sequence[nn.Embedding]:
        """The vectors of each level's codes, and last the one of a masked code."""
        return cast(Sequence[nn.Embedding], self.codes)

    @property
    def output(self) -> Sequence[nn.Linear]:
        """The last layer of each level."""
        return cast(Sequence[nn.Linear], self.heads)

    def _rotary(self, places: int) -> Rotary | None:
        """The tables of the first places, made once on each device; float32 or wider."""
        if self.config.positions == "learned":
            return None
        if self.device not in self._tables:
            with torch.inference_mode(False):  # training may come later, and saves them for its gradients
                cos, sin = rotary_tables(self.layout.coordinates(), self.config.width // self.config.heads)
                self._tables[self.device] = (cos.to(self.device), sin.to(self.device))
        cos, sin = self._tables[self.device]
        dtype = torch.promote_types(self.dtype, torch.float32)
        return cos[:places].to(dtype), sin[:places].to(dtype)

    def _context(self, upper: Sequence[Tensor], label: Tensor | None) -> Tensor:
        """(B or 1, places, D): what each place is told; the label is told to all."""
        context: Context = self.context(upper, label)
        return context.aligned if context.whole is None else context.aligned + context.whole[:, None]

    # Likelihood and training -----------------------------------------------------------------------------------
    def _features(self, level: int, seen: Sequence[Tensor], told: Tensor, keep: Tensor | None) -> Tensor:
        """(B, positions, D), what the head of own level ``level`` is given.

        Args:
            seen: (B, positions) for each own level up to this one, whose masked codes are ``vocab``.
            told: what ``_context`` returns.
            keep: dropout factors.
        """
        x = torch.cat([table(tokens) for table, tokens in zip(self.tables, seen, strict=False)], 1)
        x = self.trunk(x + told[:, : x.shape[1]], self._rotary(x.shape[1]), keep)
        return x[:, -self.layout.sizes[level] :]

    def logits(self, codes: Sequence[Tensor], masked: Tensor, cond: Cond | None = None) -> Tensor:
        """(B, positions, vocab) of one level, given what is not masked of it and all levels above.

        Args:
            codes: the levels up to that one, which is the last of them.
            masked: (B, *shape) bool: where its codes are not seen.
        """
        stop = len(codes)
        if not self.levels.start < stop <= self.levels.stop:
            raise ValueError(f"codes: {stop} levels; expected {self.levels.start + 1} to {self.levels.stop}")
        upper, own, label = self._arguments(codes, cond, check=True, stop=stop)
        if masked.dtype != torch.bool or masked.shape != codes[-1].shape:
            raise ValueError(f"masked: {masked.dtype} {tuple(masked.shape)}; expected torch.bool {tuple(codes[-1].shape)}")
        seen = [*own[:-1], torch.where(masked.to(self.device).flatten(1), self.own[len(own) - 1].vocab, own[-1])]
        return packed(self.output[len(own) - 1])(self._features(len(own) - 1, seen, self._context(upper, label), None))

    def loss(self, codes: Sequence[Tensor], cond: Cond | None = None, rng: StepRng | None = None) -> tuple[Tensor, Stats]:
        """The mean cross-entropy of the masked codes of each level, averaged over the levels by their positions; in nats.

        Without ``rng`` all samples have the same masks, those of a fixed number.
        """
        upper, own, label = self._arguments(codes, cond, check=False)
        told = self._context(self._corrupt_upper(upper, rng), self._drop_label(label, rng))
        seen, keep = self._corrupt(own, rng), self._keep(rng, self.config.depth, 2, self.config.width)
        rng = rng or self._same_for_all(len(own[0]))
        each = []
        for i, target in enumerate(own):
            share = rng.uniform("mask/share", level=i, dtype=torch.float64)
            count = masked_count(self.config.schedule, share, target.shape[1])
            masked = masked_places(rng.uniform("mask/places", target.shape[1], level=i), count)
            nats = self._nats(i, own, seen, masked, told, keep)
            each.append(nats.sum(1) / count)
        weights = [size / len(self.layout) for size in self.layout.sizes]
        loss = torch.stack([weight * nats for weight, nats in zip(weights, each, strict=True)]).sum(0).mean()
        stats = {"masked_bits": bits(loss.detach())}
        if len(each) > 1:
            stats |= {f"masked_bits/{level.name}": bits(nats.detach().mean()) for level, nats in zip(self.own, each, strict=True)}
        return loss, stats

    def _nats(
        self, level: int, own: Sequence[Tensor], seen: Sequence[Tensor], masked: Tensor, told: Tensor, keep: Tensor | None
    ) -> Tensor:
        """(B, positions) the cross-entropy of the masked codes of a level, 0 elsewhere; in float32 or wider.

        Elsewhere no logits are computed, where that is known without waiting for a device: on a CPU.
        """
        tokens = [*seen[:level], torch.where(masked, self.own[level].vocab, seen[level])]
        x, codes = self._features(level, tokens, told, keep).flatten(0, 1), own[level].flatten()
        places = masked.flatten().nonzero()[:, 0] if masked.device.type == "cpu" else None
        if places is not None:
            x, codes = x.index_select(0, places), codes[places]
        logits = packed(self.output[level])(x)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        nats = F.cross_entropy(wide, codes, reduction="none")
        if places is None:
            return torch.where(masked, nats.view_as(masked), 0)
        return nats.new_zeros(masked.numel()).index_put((places,), nats).view_as(masked)

    def nll(self, codes: Sequence[Tensor], cond: Cond | None = None, rng: StepRng | None = None) -> Tensor:
        """(B, positions) an unbiased estimate of an upper bound, level after level in raster order.

        Codes drawn one by one in a random order sigma have -log p(x) <= E_sigma sum_t -log p(x_sigma(t) | those before it), by
        Jensen. With the mask of m codes uniform in 1..N, that is E_m N / m sum over the masked i of -log p(x_i | not masked)
        (Uria et al. 2014, arXiv:1310.1757; Hoogeboom et al. 2022, arXiv:2110.02037): one pass per draw of (m, mask), ``nll_samples``
        of them, with m drawn from equal strata. Entry i is N / m times the nats of code i where it is masked, else 0: a single
        entry says little, the mean over samples is the mean cost of position i. One draw has a standard deviation of about
        s sqrt(ln N / N) nats per code, s that of a code's nats; means over a data set hardly feel it.

        Args:
            rng: draws the masks; without it all samples have the same ones, those of a fixed number.
        """
        with inference(self):
            upper, own, label = self._arguments(codes, cond, check=True)
            told = self._context(upper, label)
            n, draws = len(own[0]), self.config.nll_samples
            rng = rng or self._same_for_all(n)
            out = []
            for i, target in enumerate(own):
                size = target.shape[1]
                strata = torch.arange(draws, device=self.device)
                share = (strata + rng.uniform("nll/count", draws, level=i, dtype=torch.float64)) / draws
                count = 1 + (share * size).long().clamp(max=size - 1)
                masked = masked_places(rng.uniform("nll/places", draws, size, level=i), count)
                nats = [self._nats(i, own, own, masked[:, k], told, None) * (size / count[:, k, None]) for k in range(draws)]
                out.append(torch.stack(nats).mean(0))
            return torch.cat(out, 1)

    def by_level(self, each: Tensor) -> list[Tensor]:
        return list(each.split(self.layout.sizes, -1))

    def _same_for_all(self, n: int) -> StepRng:
        """Draws that are the same for each of ``n`` samples, so that none depends on its batch."""
        return StepRng(0, 0, torch.zeros(n, dtype=torch.int64, device=self.device))

    # Sampling --------------------------------------------------------------------------------------------------
    def check_options(self, options: Mapping[str, Any], cond: Cond | None = None) -> tuple[Any, ...]:
        chosen = super().check_options(options, cond)
        for level, each in zip(self.own, chosen, strict=True):
            each.check_positions(level.name, level.positions)
        return chosen

    def _sample(
        self, ids: Tensor, upper: Sequence[Tensor], label: Tensor | None, seed: int, known: Known | None, options: Sequence[MaskGITOptions]
    ) -> list[Tensor]:
        """A draw takes the number that (seed, sample, level, position, step) names.

        Known cells of a level do not bear on the levels above it, which are drawn first.
        """
        n, drawn = len(ids), list[Tensor]()
        predictor = Predictor(self, n, upper, label, any(each.guided for each in options))
        dtype = torch.promote_types(self.dtype, torch.float32)
        finite = torch.ones((), dtype=torch.bool, device=ids.device)
        for i, (level, how) in enumerate(zip(self.own, options, strict=True)):

            def numbers(purpose: str, where: Tensor, step: int, at: int = self.levels.start + i) -> Tensor:
                return uniform(seed, f"sample/{purpose}", ids[:, None], at, where, step, dtype)

            given = None if known is None else (known[0][i].flatten(1), known[1][i].flatten(1))
            shared = not upper and i == 0 and known is None
            scores = predictor.scores(drawn, how, shared, None if given is None else given[1])
            codes, fine = decode(scores, numbers, level.shape, level.vocab, n, how, self.config.schedule, ids.device, given)
            finite &= fine
            drawn.append(codes)
        if not finite:
            raise ValueError(f"sample: the logits of this {self.type_name} prior are not finite")
        return [codes.view(n, *level.shape) for codes, level in zip(drawn, self.own, strict=True)]
