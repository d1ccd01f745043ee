"""A tokenizer and the priors over its codes as one generator of signals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor

from intarsia.specs import Cond, SignalSpec
from pipelines.fit import check_fit, check_options, whole
from pipelines.labels import Label, drawn_labels, label_tensor
from pipelines.likelihood import nats
from pipelines.outputs import check_output, converted, from_public, to_public
from pipelines.request import Request, checked_request
from pipelines.saving import load_prior, load_tokenizer, publish_pipeline, read_pipeline, write_pipeline
from stage1_tokenizer.tokenizers.base import Tokenizer
from stage2_prior.priors.base import Prior

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class TwoStagePipeline:
    """tokenizer + priors: ``sample`` draws codes level by level, coarse to fine, and decodes them.

    Signals are (n, C, *axes) in [0, 1] (audio: [-1, 1]), on any device. Sample i of a seed has the same bits whatever n,
    ``batch_size``, order and number of processes: the networks see fixed, padded micro-batches, and every draw is a
    function of (seed, i, level, position). The bits do depend on the device, the dtype and the number of threads.

    Attributes:
        tokenizer, priors: the parts; the priors in order of their levels, coarse to fine.
        micro_batch: rows of the priors' micro-batches; the tokenizer has its own.
        defaults: sampling options where a call gives none.
        classes: names of the classes that a label can be; empty where no prior takes labels.
        last_seed: the seed of the latest ``sample`` or ``stream``; None before.
    """

    def __init__(
        self, tokenizer: Tokenizer, priors: Sequence[Prior], *, micro_batch: int = 32, defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Raises ValueError where the parts do not fit: see ``pipelines.fit.check_fit``."""
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError(f"tokenizer: a {type(tokenizer).__name__}; expected a Tokenizer")
        self.tokenizer = tokenizer
        self.priors = tuple(priors)
        self.spec = tokenizer.spec
        check_fit(tokenizer, self.spec, self.priors)
        self.micro_batch = whole("micro_batch", micro_batch, 1)
        self.defaults = dict(defaults or {})
        check_options(self.priors, self.defaults)
        self._labelled = next((prior.spec for prior in self.priors if prior.conditional), None)
        self.classes = () if self._labelled is None else self._labelled.classes
        self.last_seed: int | None = None

    # Where it is -----------------------------------------------------------------------------------------------
    @property
    def signal(self) -> SignalSpec:
        return self.spec.signal

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tokenizer.dtype

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves all parts, as ``nn.Module.to`` does: ``to("cuda")``, ``to("cuda", torch.bfloat16)``. Quantisers stay in float32 or wider.

        Another dtype changes the last bits of latents, and so a few codes of ``encode``: publish and save before the cast.
        """
        parts: tuple[torch.nn.Module, ...] = (self.tokenizer, *self.priors)
        for part in parts:
            part.to(*args, **kwargs)
        return self

    def __repr__(self) -> str:
        priors = ", ".join(f"{type(p).__name__}({p.levels.start}:{p.levels.stop})" for p in self.priors)
        return f"TwoStagePipeline({type(self.tokenizer).__name__}, [{priors}], {self.signal.channels} x {self.signal.shape}, {self.device})"

    # Sampling --------------------------------------------------------------------------------------------------
    @overload
    def sample(
        self,
        n: int,
        *,
        label: Label | None = ...,
        seed: int | None = ...,
        batch_size: int | None = ...,
        output: Literal["pt"] = ...,
        progress: bool | None = ...,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def sample(self, n: int, *, output: Literal["np"], **arguments: Any) -> np.ndarray[Any, Any]: ...

    @overload
    def sample(self, n: int, *, output: Literal["pil"], **arguments: Any) -> list[Image]: ...

    def sample(
        self,
        n: int,
        *,
        label: Label | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        output: str = "pt",
        progress: bool | None = None,
        **options: Any,
    ) -> Tensor | np.ndarray[Any, Any] | list[Image]:
        """Samples 0 to n - 1 of a seed: what ``stream`` gives, stacked.

        Args:
            n: at least 1.
            label: a class index, a class name, or one of them for each sample (sequence, or (n,) integer tensor); None draws
                each sample's class by the training frequencies, from the sample's own randomness.
            seed: at least 0; None takes a fresh one, which ``last_seed`` then holds.
            batch_size: how many samples are in the making at once; memory and speed depend on it, the bits do not.
            output: "pt" a float tensor (n, C, *axes) on the CPU; "np" an array of the same shape; "pil" a list of pictures.
            progress: True shows a progress bar at once, None after two seconds, False never.
            options: of the priors, such as ``temperature``, ``top_k``, ``top_p``, ``guidance``.

        Raises:
            ValueError: naming the argument, before any sample is drawn.
        """
        check_output(output, self.signal)
        request = self._request(n, 0, label, seed, batch_size, progress, options)
        out: Tensor | None = None
        for ids, x in self._drawn(request):
            if out is None:
                out = x.new_empty((request.n, *x.shape[1:]))
            out[ids] = x
        assert out is not None
        return converted(out, output)

    def stream(
        self,
        n: int,
        *,
        first: int = 0,
        label: Label | None = None,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Tensor]]:
        """(index, signal (C, *axes) on the CPU) of samples ``first`` to ``first + n - 1``, in memory that does not grow with n.

        Takes what ``sample`` takes; of a sequence of labels, the one at place j belongs to sample ``first + j``. The arguments
        are checked by the call itself, before the first sample is asked for.
        """
        request = self._request(n, first, label, seed, batch_size, progress, options)
        return ((int(i), row.clone()) for ids, x in self._drawn(request) for i, row in zip(ids, x, strict=True))

    def labels(self, n: int, *, first: int = 0, seed: int) -> Tensor:
        """(n,) int64: the classes that samples ``first`` to ``first + n - 1`` of a seed have where no label is given."""
        if self._labelled is None:
            raise ValueError("labels: no prior of this pipeline takes labels")
        first = whole("first", first, 0)
        return drawn_labels(torch.arange(first, first + whole("n", n, 1)), whole("seed", seed, 0), self._labelled.class_counts)

    def _request(
        self, n: int, first: int, label: Any, seed: int | None, batch_size: int | None, progress: bool | None, options: Mapping[str, Any]
    ) -> Request:
        request = checked_request(
            self.priors,
            self._labelled,
            n,
            first=first,
            label=label,
            seed=seed,
            batch_size=max(self.micro_batch, self.tokenizer.config.micro_batch) if batch_size is None else batch_size,
            progress=progress,
            options=self.defaults | dict(options),
        )
        self.last_seed = request.seed
        return request

    def _drawn(self, request: Request) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices (b,), signals (b, C, *axes)) on the CPU, batch by batch."""
        return ((ids, self._draw(ids, request)) for ids in request.batches())

    @torch.no_grad()
    def _draw(self, ids: Tensor, request: Request) -> Tensor:
        codes: list[Tensor] = []
        label = None if request.label_of is None else request.label_of(ids).to(self.device)
        for prior, options in zip(self.priors, request.options, strict=True):
            cond = Cond(label=label) if prior.conditional else None
            codes += prior.sample(
                ids.to(self.device), upper=tuple(codes), cond=cond, seed=request.seed, micro_batch=self.micro_batch, **options
            )
        return to_public(self.tokenizer.decode(codes), self.signal).cpu()

    # Signals and codes -----------------------------------------------------------------------------------------
    def encode(self, x: Tensor) -> list[Tensor]:
        """Signals (n, C, *axes) in [0, 1] to codes, one (n, *grid) int64 tensor per level, on the pipeline's device."""
        return self.tokenizer.encode(from_public(x, self.signal).to(self.device))

    def decode(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes of all levels, or of leading ones that the tokenizer decodes alone, to signals (n, C, *axes) in [0, 1]."""
        return to_public(self.tokenizer.decode([c.to(self.device) for c in codes]), self.signal)

    def reconstruct(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``: signals in [0, 1] as their codes keep them."""
        return self.decode(self.encode(x))

    # Likelihood ------------------------------------------------------------------------------------------------
    @property
    def nll_is_bound(self) -> bool:
        """True where ``nll`` is an upper bound, because that of a prior is."""
        return any(prior.nll_is_bound for prior in self.priors)

    def nll(self, x: Tensor | Sequence[Tensor], label: Label | None = None) -> Tensor:
        """(n,) float64: -log p(codes | label) in nats, summed over all codes of the levels that the priors model.

        Args:
            x: signals (n, C, *axes) in [0, 1], or their codes, one (n, *grid) int64 tensor per level.
            label: as in ``sample``; None asks the priors without a label, which those trained with labels always present refuse.
        """
        codes = [c.to(self.device) for c in (self.encode(x) if isinstance(x, Tensor) else x)][: self.priors[-1].levels.stop]
        if label is not None and not self.classes:
            raise ValueError("label: no prior of this pipeline takes labels")
        n = len(codes[0]) if codes else 0
        given = None if label is None else label_tensor(label, n, self.classes).expand(n).to(self.device)
        return nats(self.priors, codes, given, self.micro_batch)

    def bits_per_image(self, x: Tensor | Sequence[Tensor], label: Label | None = None) -> Tensor:
        """(n,) float64: ``nll`` in bits."""
        return self.nll(x, label) / math.log(2)

    # Saving and loading ----------------------------------------------------------------------------------------
    @classmethod
    def from_runs(cls, tokenizer_run: str | Path, prior_runs: str | Path | Sequence[str | Path], **settings: Any) -> Self:
        """The released models (``model/``) of a tokenizer's run folder and of one prior's or several, coarse to fine.

        Args:
            settings: ``micro_batch`` and ``defaults`` of the constructor.
        """
        runs = [prior_runs] if isinstance(prior_runs, str | Path) else prior_runs
        return cls(load_tokenizer(tokenizer_run), [load_prior(run) for run in runs], **settings)

    def save_pretrained(
        self, folder: str | Path, *, samples: int = 0, metrics: Mapping[str, float] | None = None, license: str | None = None
    ) -> None:
        """Writes ``pipeline.json``, ``tokenizer/``, ``priors/0/``, ... and a model card; a pipeline that was there is replaced.

        Args:
            samples: draws so many for a picture on the model card (of images only).
            metrics: figures for the model card.
            license: for the model card; left out where None.
        """
        write_pipeline(self, Path(folder), samples=samples, metrics=metrics, license=license)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        max_bytes: int | None = None,
    ) -> Self:
        """A saved pipeline, from a folder or the Hub; all parts come from one commit. See ``Pretrained.from_pretrained``."""
        source = {"local_files_only": local_files_only, "token": token}
        return cls(**read_pipeline(path_or_repo, revision=revision, max_bytes=max_bytes, source=source))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        samples: int = 16,
        private: bool = False,
        revision: str | None = None,
        commit_message: str | None = None,
        metrics: Mapping[str, float] | None = None,
        license: str | None = None,
    ) -> str:
        """Publishes the pipeline as one commit and returns its id; see ``save_pretrained`` for ``samples``, ``metrics``, ``license``."""
        place = {"private": private, "revision": revision, "commit_message": commit_message}
        return publish_pipeline(self, repo_id, samples=samples, metrics=metrics, license=license, **place)

    @classmethod
    def bundled(cls) -> Self:
        """The trained pipeline that ships with the package. Raises FileNotFoundError where the package was built without it."""
        folder = Path(str(resources.files("pipelines"))) / "bundled"
        if not (folder / "pipeline.json").is_file():
            raise FileNotFoundError(f"{folder}: this copy of intarsia holds no trained pipeline; give --pipeline, or train one")
        return cls.from_pretrained(folder)
