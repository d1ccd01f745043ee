"""Files of the MNIST format (idx), gzipped or not: MNIST, Fashion-MNIST, KMNIST, EMNIST, ..."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from intarsia.config import ConfigError, Place
from stage1_tokenizer.data.arrays import ArraySplit
from stage1_tokenizer.data.base import SOURCES, DataError, Source, SourceConfig

_TYPES = {kind: np.dtype(name) for kind, name in ((0x08, ">u1"), (0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8"))}
MAX_BYTES = 1 << 36


class IdxConfig(SourceConfig):
    """MNIST-format files. The test files are split ``test``; validation is held out of the train files.

    Debian's package ``dataset-fashion-mnist`` installs those of Fashion-MNIST.
    """

    root: Place[str] = ""
    """The folder of the files."""
    train_images: Place[str] = "train-images-idx3-ubyte"
    """File in ``root``, or a path; ``.gz`` is tried too."""
    train_labels: Place[str] = "train-labels-idx1-ubyte"
    """Likewise; empty for unlabelled data."""
    test_images: Place[str] = "t10k-images-idx3-ubyte"
    """Likewise; empty for no test split."""
    test_labels: Place[str] = "t10k-labels-idx1-ubyte"
    """Likewise; empty for unlabelled data."""
    classes: tuple[str, ...] = ()
    """Names of the labels; without them, the numbers."""


@SOURCES.register("idx", IdxConfig)
class IdxSource(Source):
    """The images of MNIST-format files, held in memory."""

    config: IdxConfig

    def __init__(self, config: IdxConfig) -> None:
        super().__init__(config)
        if not config.root and not any(Path(config.train_images + end).is_file() for end in ("", ".gz")):
            raise ConfigError(["data.root: the folder of the idx files is needed"])
        splits = {"train": self._read("train_images", "train_labels")}
        if config.test_images:
            splits["test"] = self._read("test_images", "test_labels")
        labels = [s.labels for s in splits.values() if s.labels is not None]
        numbers = tuple(str(i) for i in range(max(int(v.max()) for v in labels) + 1)) if labels else ()
        self._finish(splits, (config.classes or numbers) if labels else ())

    def _path(self, field: str) -> Path:
        name = getattr(self.config, field)
        path = Path(self.config.root) / name
        for found in (path, path.with_name(path.name + ".gz")):
            if found.is_file():
                return found
        raise DataError(f"data.{field}: neither {str(path)!r} nor {str(path) + '.gz'!r} is a file")

    def _read(self, images: str, labels: str) -> ArraySplit:
        x = read_idx(path := self._path(images))
        if x.dtype != np.uint8 or x.ndim not in (3, 4):
            raise DataError(f"{path}: {x.dtype} of shape {x.shape}; expected uint8 (samples, height, width)")
        x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
        y = None
        if getattr(self.config, labels):
            y = read_idx(path_y := self._path(labels))
            if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
                raise DataError(f"{path_y}: {y.dtype} of shape {y.shape}; {path.name} has {len(x)} images")
        return ArraySplit(x, y, self.config.transform)

    def _identity(self) -> dict[str, Any]:
        return {"type": "idx"}


def read_idx(path: Path) -> np.ndarray[Any, Any]:
    """The array in an idx file, in the machine's byte order. Raises DataError that names the file.

    Format: two zero bytes, a byte for the type, a byte for the number of axes, the lengths as big-endian uint32, the values row-major.
    """
    try:
        with open(path, "rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES or not 1 <= head[3] <= 4:
                raise DataError(f"{path}: no idx file; it starts with {head[:4].hex() or 'nothing'}")
            kind: np.dtype[Any] = _TYPES[head[2]]
            axes = head[3]
            lengths = file.read(4 * axes)
            if len(lengths) < 4 * axes:
                raise DataError(f"{path}: truncated in its header")
            shape = struct.unpack(f">{axes}I", lengths)
            expected = int(np.prod(shape, dtype=object)) * kind.itemsize
            if expected > MAX_BYTES:
                raise DataError(f"{path}: its header promises {expected} bytes of shape {shape}; at most {MAX_BYTES} are read")
            body = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from None
    if len(body) != expected:
        held = f"{len(body)} bytes" if len(body) < expected else "more"
        raise DataError(f"{path}: {held} of values; its header promises {expected} of shape {shape}")
    return np.frombuffer(body, kind).reshape(shape).astype(kind.newbyteorder("="))
