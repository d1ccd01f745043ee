"""Splits of encoded images: decoded for each batch by a pool of threads, or once, and held in memory as uint8."""

from __future__ import annotations

import hashlib
import os
import threading
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intarsia.specs import SignalSpec
from stage1_tokenizer.data.base import DataError, Split, caption_bytes, check_captions
from stage1_tokenizer.data.errors import BadFileError
from stage1_tokenizer.data.image import ImageError, decode, read_header
from stage1_tokenizer.data.pool import Pool
from stage1_tokenizer.data.transform import TransformConfig, take, to_signal, windows

DIGEST_SAMPLES = 512


class Items:
    """Encoded images by position; thread-safe."""

    def __len__(self) -> int:
        raise NotImplementedError

    def open(self, i: int) -> Any:
        """What ``image.open_image`` takes: a path, the bytes, or a PIL image. Raises ImageError with the reason."""
        raise NotImplementedError

    def name(self, i: int) -> str:
        """For messages."""
        raise NotImplementedError

    def facts(self, i: int) -> bytes:
        """What the digest holds of each item: its name and size, as far as they are the same on every machine."""
        raise NotImplementedError

    def content(self, i: int) -> bytes:
        """The encoded bytes; the digest holds them of some items."""
        raise NotImplementedError

    def select(self, rows: Tensor) -> Items:
        raise NotImplementedError


class FileItems(Items):
    """Files below ``root`` by their relative names, with "/" between folders."""

    def __init__(self, root: str, names: list[str]) -> None:
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def open(self, i: int) -> str:
        if any(unicodedata.category(c) in ("Cs", "Cc") for c in self.names[i]):  # bytes that are no UTF-8 come as lone surrogates
            raise ImageError("the name of the file is not UTF-8, or holds a control character; rename it")
        return os.path.join(self.root, self.names[i])

    def name(self, i: int) -> str:
        path = os.path.join(self.root, self.names[i])
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)

    def facts(self, i: int) -> bytes:
        return f"{self.names[i]}\0{os.stat(self.open(i)).st_size}\n".encode()

    def content(self, i: int) -> bytes:
        with open(self.open(i), "rb") as file:
            return file.read()

    def select(self, rows: Tensor) -> FileItems:
        return FileItems(self.root, [self.names[i] for i in rows.tolist()])


class DecodedSplit(Split):
    """Args: ``sizes`` (N, 2) int64, height and width of each image before the transform; ``channels`` after it."""

    def __init__(
        self,
        items: Items,
        sizes: Tensor,
        channels: int,
        transform: TransformConfig,
        pool: Pool,
        labels: Tensor | None = None,
        origin: Tensor | None = None,
        captions: Sequence[str] | None = None,
    ) -> None:
        self.items, self.sizes, self.channels, self.transform, self.pool = items, sizes, channels, transform, pool
        self.labels = labels
        self.origin = torch.arange(len(items)) if origin is None else origin
        self.captions = check_captions(captions, len(items))
        kinds, which = torch.unique(sizes, dim=0, return_inverse=True)
        self.scaled = torch.tensor([transform.scaled(h, w) for h, w in kinds.tolist()])[which]
        self.out = transform.target(*kinds[0].tolist())
        self.signal = SignalSpec("image", channels, self.out)
        self.trims = transform.crop == "center" and transform.shift == 0  # nothing but the centre is ever asked for
        self._lock = threading.Lock()
        self._held: Tensor | list[np.ndarray[Any, Any]] | None = None

    @property
    def bytes(self) -> int:
        """What all images take once they are decoded and resized."""
        areas = self.out[0] * self.out[1] * len(self) if self.trims else int(self.scaled.prod(1).sum())
        return areas * self.channels

    def decode(self, i: int) -> np.ndarray[Any, Any]:
        """(C, h, w) uint8 of image ``i``, resized, not yet cropped. Raises DataError naming it."""
        height, width = self.scaled[i].tolist()
        try:
            data = self.items.open(i)
            header = read_header(data)
            if [header.height, header.width] != self.sizes[i].tolist():
                raise DataError(f"{self.items.name(i)}: it changed since it was first read")
            return decode(data, (height, width), self.channels)
        except ImageError as error:
            replaceable = isinstance(self.items, FileItems) and i not in self._sampled()
            raise BadFileError(f"{self.items.name(i)}: {error}", replaceable) from error

    def hold(self) -> None:
        """Decodes every image, once; batches then come from memory."""
        with self._lock:
            if self._held is not None:
                return
            if self.trims or len(torch.unique(self.scaled, dim=0)) == 1:
                size = self.out if self.trims else tuple(self.scaled[0].tolist())
                array = np.empty((len(self), self.channels, *size), np.uint8)

                def fill(i: int) -> None:
                    image = self.decode(i)
                    top, left = ((s - o) // 2 for s, o in zip(image.shape[1:], size, strict=True))
                    array[i] = image[:, top : top + size[0], left : left + size[1]]

                self.pool.map(fill, range(len(self)), self.items.name)
                self._held = torch.from_numpy(array)
            else:
                self._held = self.pool.map(self.decode, range(len(self)), self.items.name)

    def _signals(self, indices: Tensor, epochs: Tensor | int | None, seed: int, view: int) -> Tensor:
        held = self._held
        if isinstance(held, Tensor):
            return to_signal(take(held, self.transform, self.out, indices, epochs, seed, view))
        rows = indices.tolist()
        places = [p.numpy() for p in windows(self.transform, self.scaled[indices], self.out, indices, epochs, seed, view)]
        batch = np.empty((len(rows), self.channels, *self.out), np.uint8)

        def fill(k: int) -> None:
            image = self.decode(rows[k]) if held is None else held[rows[k]]
            batch[k] = image[:, places[0][k]][:, :, places[1][k]]

        if held is None:
            self.pool.map(fill, range(len(rows)), lambda k: self.items.name(rows[k]))
        else:
            for k in range(len(rows)):
                fill(k)
        return to_signal(torch.from_numpy(batch))

    def select(self, rows: Tensor) -> DecodedSplit:
        labels = None if self.labels is None else self.labels[rows]
        return DecodedSplit(
            self.items.select(rows), self.sizes[rows], self.channels, self.transform, self.pool, labels, self.origin[rows],
            self._captions_at(rows),
        )  # fmt: skip

    def digest(self) -> str:
        """Over the name and size of every image, its label and caption, and the content of DIGEST_SAMPLES evenly spaced ones."""
        sha = hashlib.sha256()
        for i in range(len(self)):
            sha.update(self.items.facts(i))
        return self._labels_and_content(sha)

    def sketch(self) -> str:
        """``digest`` without the names and sizes."""
        return self._labels_and_content(hashlib.sha256(f"{len(self)};".encode()))

    def _labels_and_content(self, sha: hashlib._Hash) -> str:
        if self.labels is not None:
            sha.update(self.labels.numpy().tobytes())
        if (captions := caption_bytes(self.captions)) is not None:
            sha.update(captions.data)
        for i in self._sampled():
            sha.update(self.items.content(i))
        return sha.hexdigest()

    def _sampled(self) -> list[int]:
        """The positions of the images whose content digest and sketch hold."""
        positions: list[int] = np.unique(np.linspace(0, len(self) - 1, DIGEST_SAMPLES).round().astype(int)).tolist()
        return positions
