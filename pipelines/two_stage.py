"""A tokenizer and the priors over its codes as one generator of signals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from torch import Tensor

from pipelines.completion import Completions
from pipelines.drawing import draw_codes
from pipelines.fit import whole
from pipelines.labels import Label, drawn_labels, label_source
from pipelines.outputs import check_output, converted
from pipelines.request import Request
from pipelines.saving import load_prior, load_tokenizer, publish_pipeline, read_pipeline, write_pipeline

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


class TwoStagePipeline(Completions):
    """tokenizer + priors: ``sample`` draws codes level by level, coarse to fine, and decodes them.

    Signals are (n, C, *axes) in [0, 1] (audio: [-1, 1]), on any device. Sample i of a seed has the same bits whatever n,
    ``batch_size``, order and number of processes: the networks see fixed, padded micro-batches, and every draw is a
    function of (seed, i, level, position). The bits do depend on the device, the dtype and the number of threads.

    Attributes: those of ``PipelineParts``. The arguments of ``complete``, ``inpaint``, ``outpaint`` and ``variations`` are
    described at ``Completions``.
    """

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
            options: of the priors, such as ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``guidance``; a value for every prior
                that has the option, or {name of a level: value}. ``guidance`` takes {"start", "stop"}, too.

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
        request = self._checked(n, first, seed, batch_size, progress=progress, options=options)
        if self._labelled is not None:
            request = replace(request, label_of=label_source(label, request.n, request.first, request.seed, self._labelled))
        elif label is not None:
            raise ValueError("label: no prior of this pipeline takes labels")
        self.last_seed = request.seed
        return request

    def _drawn(self, request: Request) -> Iterator[tuple[Tensor, Tensor]]:
        """(indices (b,), signals (b, C, *axes)) on the CPU, batch by batch."""
        return ((ids, self._draw(ids, request)) for ids in request.batches())

    def _draw(self, ids: Tensor, request: Request) -> Tensor:
        return self.decode(draw_codes(self.priors, ids, request, self.micro_batch)).cpu()

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

        A pipeline that the folder holds is replaced; other files stay.

        Args:
            samples: draws so many for a picture on the model card (of images only).
            metrics: figures for the model card.
            license: for the model card; left out where None.

        Raises:
            FileExistsError: for a file, a data set of images, and a folder that holds one of the names to be written, but no pipeline.
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
