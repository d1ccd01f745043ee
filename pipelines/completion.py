"""Completing signals: what a mask leaves open is drawn by the priors, given all that is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pipelines.drawing import draw_codes
from pipelines.fit import whole
from pipelines.labels import Label
from pipelines.masks import check_mask, check_size, enlarged, filled, generated_share, kept_cells
from pipelines.options import describe
from pipelines.outputs import from_public
from pipelines.parts import PipelineParts
from pipelines.request import Request


@contextmanager
def called(argument: str) -> Iterator[None]:
    """What is wrong with ``keep`` is said of the argument that it was made from."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(": ")
        if name != "keep":
            raise
        raise ValueError(argument + colon + rest) from None


class Completions(PipelineParts):
    """``complete`` and what is made of it.

    All take these arguments beside their own:

    - ``n``: completions of each signal; those of one signal follow each other in the result.
    - ``label``: one for all, or one for each signal. None is the priors' learned null: what is known speaks for itself. Priors
      trained with labels always present need one.
    - ``first``: the number of the first completion. Completion i of a seed is the same in any batch, so that those of later
      signals come alone with ``first`` = n times the number of signals left out.
    - ``seed``, ``batch_size``, ``progress`` and sampling options as in ``sample``.

    A cell of any level is drawn if its patch touches the mask (on a grid of other axes than the signal's, if anything does:
    ``masks.kept_cells``); all others keep, exactly, the codes of ``x`` with the hidden part filled
    from its border (``masks.filled``): nothing of what ``x`` holds under the mask reaches a code, however far the encoder sees. A signal
    that is hidden as a whole is drawn as a whole. MaskGIT takes any mask. Autoregressive priors take one that leaves a prefix of the
    order in which they draw: of an image, whole rows to its end; of several levels in one sequence, whole levels. Which prior cannot is
    said before any draw.
    """

    def complete_codes(
        self,
        codes: Sequence[Tensor],
        keep: Sequence[Tensor],
        *,
        n: int = 1,
        label: Label | None = None,
        first: int = 0,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """Codes of the levels that the priors model, each (n * rows, *grid) int64, on the pipeline's device.

        Args:
            codes: one (rows, *grid) int64 tensor per level; values outside of ``keep`` have no meaning.
            keep: one (rows, *grid) bool tensor per level, True where the code stays.

        Raises:
            ValueError: naming the argument, and the prior that cannot complete what ``keep`` leaves open; before any draw.
        """
        n = whole("n", n, 1)
        given: dict[str, Any] = {"label": label, "first": first, "seed": seed, "batch_size": batch_size, "progress": progress}
        codes, keep, request = self._asked(codes, keep, n, **given, **options)
        self.last_seed = request.seed
        parts = []
        for ids in request.batches():
            row = ((ids - request.first) // n).to(self.device)
            known = ([c[row] for c in codes], [k[row] for k in keep])
            parts.append(draw_codes(self.priors, ids, request, self.micro_batch, known))
        return [torch.cat(level) for level in zip(*parts, strict=True)]

    def check_completion(self, keep: Sequence[Tensor], *, n: int = 1, **arguments: Any) -> None:
        """Raises the ValueError that ``complete_codes`` would raise for this ``keep`` and these arguments, whatever the codes."""
        self._asked([torch.zeros_like(k, dtype=torch.int64) for k in self._here("keep", keep)], keep, n, **arguments)

    def _asked(
        self,
        codes: Sequence[Tensor],
        keep: Sequence[Tensor],
        n: int,
        *,
        label: Label | None = None,
        first: int = 0,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> tuple[list[Tensor], list[Tensor], Request]:
        """What ``complete_codes`` draws from, all checked: codes and ``keep`` of the levels that the priors model, and the request."""
        stop = self.priors[-1].levels.stop
        for name, maps in (("codes", codes), ("keep", keep)):
            if not isinstance(maps, Sequence):
                raise ValueError(f"{name}: a {type(maps).__name__}; expected one torch tensor for each level, in a list")
        codes, keep = self._here("codes", codes[:stop]), self._here("keep", keep[:stop])
        counts = [len(t) for t in (*codes, *keep)]
        if len(codes) != stop or len(keep) != stop or len(set(counts)) != 1 or counts[0] == 0:
            raise ValueError(f"codes, keep: rows {counts}; expected equally many, at least 1, for each of {stop} levels")
        rows, n = len(codes[0]), whole("n", n, 1)
        arguments = {"progress": progress, "options": options, "labelled": label is not None}
        request = self._checked(n * rows, first, seed, batch_size, **arguments)
        given = self._given_labels(label, rows)
        self._check_known(codes, keep, given is not None)
        if given is not None:
            start = request.first
            request = replace(request, label_of=lambda ids: given[(ids.cpu() - start) // n])
        return codes, keep, request

    def _check_known(self, codes: Sequence[Tensor], keep: Sequence[Tensor], labelled: bool) -> None:
        for prior in self.priors:
            own = slice(prior.levels.start, prior.levels.stop)
            if not all(bool(k.all()) for k in keep[own]):  # it is asked
                self._check_label(prior, labelled)
            try:
                prior.check_known((codes[own], keep[own]))
            except ValueError as error:
                raise ValueError(f"keep: {describe(prior)} cannot complete it: {error}") from None

    def complete(self, x: Tensor, mask: Tensor, *, n: int = 1, **arguments: Any) -> Tensor:
        """Signals (n * rows, C, *axes) on the CPU, decoded from known and drawn codes.

        Args:
            x: (rows, C, *axes) in [0, 1], of the size that the priors were trained for.
            mask: (rows, 1, *axes) bool, True where to generate. ``x`` has to be a signal there, too; what it holds has no effect.

        Raises:
            ValueError: naming the argument, before any draw.
        """
        self._check_signals(x)
        check_mask(mask, len(x), self.signal)
        keep = [kept_cells(mask.to(self.device), level.shape) for level in self.spec.levels]
        with called("mask"):
            codes = self.encode(filled(x, mask.to(x.device)))
            return self.decode(self.complete_codes(codes, keep, n=n, **arguments)).cpu()

    def _check_signals(self, x: Tensor) -> None:
        """Raises ValueError for what is no signal of the size of training, and for none at all."""
        check_size(x, self.signal)
        from_public(x, self.signal)
        if len(x) == 0:
            raise ValueError(f"x: shape {tuple(x.shape)}; expected at least one signal")

    def inpaint(self, x: Tensor, mask: Tensor, *, blend: int = 0, n: int = 1, **arguments: Any) -> Tensor:
        """``complete``, with the known samples of ``x`` put back: exactly, but for a seam of ``blend`` samples that mixes both.

        The result, (n * rows, C, *axes) on the CPU, has the wider of the dtypes of ``x`` and of ``complete``, in which all values of
        ``x`` have a place: float64 where ``x`` is, whatever the pipeline computes in.

        Args:
            blend: at least 0.
        """
        blend = whole("blend", blend, 0)
        y = self.complete(x, mask, n=n, **arguments)
        dtype = torch.promote_types(x.dtype, y.dtype)
        share = generated_share(mask.cpu(), blend).to(dtype).repeat_interleave(n, 0)
        known = x.detach().to("cpu", dtype).repeat_interleave(n, 0)
        return known * (1 - share) + y.to(dtype) * share

    def outpaint(self, x: Tensor, margins: Sequence[tuple[int, int]], *, blend: int = 0, **arguments: Any) -> Tensor:
        """``inpaint`` of what lies around ``x``, on a canvas of the size that the priors were trained for.

        Args:
            x: (rows, C, *axes) in [0, 1], smaller than that along at least one axis.
            margins: for each axis (before, after), what to add: ``[(0, 14), (0, 0)]`` adds 14 rows below an image.
        """
        canvas, mask = enlarged(x, margins, self.signal)
        return self.inpaint(canvas, mask, blend=blend, **arguments)

    def variations(self, x: Tensor, redraw: int | str, **arguments: Any) -> Tensor:
        """Signals that share the codes of ``x`` above a level, with that level and those below it drawn anew.

        Args:
            x: (rows, C, *axes) in [0, 1], of the size that the priors were trained for.
            redraw: the coarsest level that is drawn, by name or index.
        """
        self._check_signals(x)
        start = self._level(redraw)
        codes = self.encode(x)
        keep = [torch.full_like(c, i < start, dtype=torch.bool) for i, c in enumerate(codes)]
        with called("redraw"):
            return self.decode(self.complete_codes(codes, keep, **arguments)).cpu()

    def _level(self, level: int | str) -> int:
        names = [each.name for prior in self.priors for each in prior.own]
        if isinstance(level, str) and level not in names:
            raise ValueError(f"redraw: unknown level {level!r}; the levels are {', '.join(names)}")
        return names.index(level) if isinstance(level, str) else whole("redraw", level, 0, len(names) - 1)
