"""Watches the codes during training: usage, perplexity, drift and dead codes; an alarm on collapse, and remedies that apply themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from intarsia.cli import RunError
from intarsia.config import Config, Place
from intarsia.distributed import Comm
from stage1_tokenizer.metrics import code_statistics, expected_codes
from stage1_tokenizer.quantizers.base import Quantizer
from stage1_tokenizer.symptoms import LARGEST_CODEBOOK, LARGEST_TABLE, code_vectors, level_quantizers, share_tables
from stage1_tokenizer.tokenizers.base import Tokenizer


class HealthConfig(Config):
    """When to worry about the codes, and what then."""

    every: Annotated[int, Field(ge=1)] = 500
    """Look at all codes since the last look, every so many steps."""
    usage: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Fewer codes than this share of the codebook, used since the last look, are a collapse."""
    collapse: Literal["warn", "auto", "stop"] = "warn"
    """warn says what to try; auto applies what can be applied in the middle of a training, one remedy at each look after which another
    follows, and says so; stop ends the run."""
    quiet: Place[bool] = False
    """Log the figures, print nothing."""


class Health(nn.Module):
    """Counts the codes of every level between two looks. Its state belongs into checkpoints; nothing of it waits for a device
    but a look. A level of more than ``LARGEST_TABLE`` codes is not watched: a table of all of them would be larger than most models.

    Attributes:
        stage: (levels,) int64, how many remedies were applied to each level.
        open: (levels,) int64, the codes that there could be at the last look, or at the start; 0 where that is not known.
        looked: () int64, the steps that were done at the last look; -1 where that is not known.
    """

    stage: Tensor
    open: Tensor
    looked: Tensor

    def __init__(self, config: HealthConfig, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.config = config
        self.levels = tokenizer.level_specs()
        self.register_buffer("stage", torch.zeros(len(self.levels), dtype=torch.int64))
        self.register_buffer("open", torch.zeros(len(self.levels), dtype=torch.int64))
        self.register_buffer("looked", torch.zeros((), dtype=torch.int64))
        self.watched = [i for i, level in enumerate(self.levels) if level.vocab <= LARGEST_TABLE]
        for i in self.watched:
            level = self.levels[i]
            self.register_buffer(f"counts_{i}", torch.zeros(level.vocab, dtype=torch.int64))  # of all ranks, as of the last fold
            self.register_buffer(f"local_{i}", torch.zeros(level.vocab, dtype=torch.int64), persistent=False)
            if level.vocab <= LARGEST_CODEBOOK:
                self.register_buffer(f"vectors_{i}", torch.zeros(0))

    def _buffer(self, name: str, i: int) -> Tensor:
        found = getattr(self, f"{name}_{i}")
        assert isinstance(found, Tensor)
        return found

    def begin(self, tokenizer: Tokenizer) -> None:
        """Before the first step, on each rank: remembers how many codes there can be, as a codebook may grow before the first look."""
        self._remember(self._quantizers(tokenizer), unknown=True)

    def _remember(self, quantizers: list[Quantizer] | None, unknown: bool = False) -> None:
        """``open`` as it is now; ``unknown``: only where it is not known."""
        for i, level in enumerate(self.levels):
            if not (unknown and int(self.open[i])):
                self.open[i] = quantizers[i].codes_in_use(level.vocab) if quantizers else level.vocab

    def _quantizers(self, tokenizer: Tokenizer) -> list[Quantizer] | None:
        signal = tokenizer.signal
        zeros = torch.zeros(1, signal.channels, *signal.shape, device=tokenizer.device, dtype=tokenizer.dtype)
        return level_quantizers(tokenizer, zeros)

    def fold(self, comm: Comm) -> None:
        """Makes the counts those of all ranks, as a checkpoint wants its state. Each rank calls it."""
        for i in self.watched:
            local = self._buffer("local", i)
            self._buffer("counts", i).add_(comm.all_reduce_sum_(local.clone()))
            local.zero_()

    @torch.no_grad()
    def count(self, codes: Sequence[Tensor]) -> None:
        """codes: (B, *grid) int64 of each level, of a micro-batch that counts."""
        for i in self.watched:
            flat = codes[i].flatten()
            self._buffer("local", i).index_add_(0, flat, torch.ones_like(flat))

    def due(self, step: int, steps: int) -> bool:
        """At its cadence, and after the last of ``steps``."""
        return (step + 1) % self.config.every == 0 or step + 1 == steps

    @torch.no_grad()
    def look(
        self,
        tokenizer: Tokenizer,
        comm: Comm,
        reinitialize: Callable[[], None],
        say: Callable[[str], None],
        left: int,
        step: int | None = None,
    ) -> dict[str, Tensor]:
        """Figures of all codes since the last look, over the ranks; acts on a collapse as configured. Each rank calls it.

        A codebook that has grown since is judged by the codes that were there all the time: the new ones have had little of it.

        Args:
            reinitialize: sets the codebooks that ask for it from data, as at the start of a training.
            say: prints a line on the main process.
            left: steps that follow. Where they are fewer than ``every``, nothing is applied any more: codes set anew want training. After
                the last one nothing is stopped either.
            step: steps that are done; without it, ``every`` are taken to have passed since the last look.

        Returns:
            health/usage, health/perplexity, health/dead and health/drift of each level. Drift is the root mean square distance that
            the codes' vectors went since the last look, as a share of their own root mean square; a level without a Quantizer has none.

        Raises:
            RunError: collapse is "stop" and it has.
        """
        quantizers = self._quantizers(tokenizer)
        figures: dict[str, Tensor] = {}
        collapsed: list[tuple[int, str]] = []
        passed = self.config.every if step is None or int(self.looked) < 0 else step - int(self.looked)
        self.looked.fill_(-1 if step is None else step)
        self.fold(comm)
        counted = [self._buffer("counts", i).clone() for i in self.watched]
        if quantizers is None:
            tables: Sequence[tuple[Tensor, Tensor | None]] = [(counts, counts) for counts in counted]
        else:
            tables = share_tables([(counts, quantizers[i]) for i, counts in zip(self.watched, counted, strict=True)])
        for i, (counts, table) in zip(self.watched, tables, strict=True):
            level, quantizer = self.levels[i], quantizers[i] if quantizers else None
            self._buffer("counts", i).zero_()
            suffix = f"/{level.name}" if len(self.levels) > 1 else ""
            if counts.sum() == 0:
                continue
            found = code_statistics(counts, level)
            open_codes = quantizer.codes_in_use(level.vocab) if quantizer else level.vocab
            open_codes = min(open_codes, int(self.open[i]) or open_codes)
            used = int((counts[:open_codes] > 0).sum())
            facts = {"usage": used / open_codes, "perplexity": found.perplexity, "dead": open_codes - used}
            drift = self._drift(i, quantizer) if quantizer else None
            facts |= {} if drift is None else {"drift": drift}
            figures |= {f"health/{name}{suffix}": torch.tensor(float(value)) for name, value in facts.items()}
            if table is None:  # judged with the first level of this codebook
                continue
            used, seen = int((table[:open_codes] > 0).sum()), int(table[:open_codes].sum())
            if used < self.config.usage * expected_codes(open_codes, seen):
                collapsed.append((i, f"level {level.name}: {used} of {open_codes} codes used in the last {passed} steps"))
        self._remember(quantizers)
        if collapsed:
            self._act(collapsed, quantizers, reinitialize, say, left)
        return figures

    def _drift(self, i: int, quantizer: Quantizer) -> float | None:
        vectors = code_vectors(quantizer, self.levels[i])
        if vectors is None:
            return None
        before = getattr(self, f"vectors_{i}")
        setattr(self, f"vectors_{i}", vectors.clone())
        if before.shape != vectors.shape:
            return None
        return float((vectors - before).square().mean().sqrt() / before.square().mean().sqrt().clamp_min(1e-12))

    def _act(self, collapsed: list[tuple[int, str]], quantizers: list[Quantizer] | None, reinitialize: Any, say: Any, left: int) -> None:
        tell = (lambda line: None) if self.config.quiet else say
        tries = {i: (quantizers[i] if quantizers else Quantizer).advice["collapse"] for i, _ in collapsed}
        if self.config.collapse == "stop" and left:
            raise RunError(f"collapse: {'; '.join(f'{what}; try: {tries[i]}' for i, what in collapsed)}")
        applied = False
        for i, what in collapsed:
            remedies = quantizers[i].remedies() if quantizers else ()
            stage = int(self.stage[i])
            if self.config.collapse != "auto":
                tell(f"collapse: {what}; in a new run try: {tries[i]}{', or health.collapse: auto' if remedies else ''}")
            elif left < self.config.every:
                tell(f"collapse: {what}; too late for a remedy, {left} steps before the end; in a new run try: {tries[i]}")
            elif stage >= len(remedies):
                tell(f"collapse: {what}; all remedies are applied ({', '.join(remedies) or 'there is none for it'}); try: {tries[i]}")
            elif quantizers:
                quantizers[i].remedy(remedies[stage])
                self.stage[i] += 1
                applied = True
                tell(f"collapse: {what}; applied: {remedies[stage]}")
        if applied:
            reinitialize()

    def restore(self, tokenizer: Tokenizer) -> None:
        """After a resumption: what was applied holds again. A codebook is not set anew."""
        self.begin(tokenizer)
        if not bool(self.stage.any()):
            return
        for quantizer, stage in zip(self._quantizers(tokenizer) or [], self.stage.tolist(), strict=True):
            for remedy in quantizer.remedies()[:stage]:
                quantizer.remedy(remedy, again=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """The vectors of the last look have the size of the codebook, or none before the first look. Checkpoints of older versions
        do not know ``open`` and ``looked``."""
        state_dict.setdefault(f"{prefix}open", torch.zeros_like(self.open))
        state_dict.setdefault(f"{prefix}looked", torch.full_like(self.looked, -1))
        for i in self.watched:
            if (saved := state_dict.get(f"{prefix}vectors_{i}")) is not None:
                setattr(self, f"vectors_{i}", torch.zeros_like(saved, device=self.stage.device))
        super()._load_from_state_dict(state_dict, prefix, *args)
