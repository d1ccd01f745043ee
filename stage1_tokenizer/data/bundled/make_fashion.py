"""Makes the bundled set ``fashion`` and the list of held-out indices from the files of Fashion-MNIST.

    python stage1_tokenizer/data/bundled/make_fashion.py --root FOLDER [--out FOLDER]

FOLDER holds the four gzipped idx files, as Debian's package ``dataset-fashion-mnist`` installs them. Of each class of the train
part, in an order that is a function of a fixed seed: the first 1,000 images train, the next 200 validate, and 300 more
are held out beside those 200 in runs on the full set (``holdout: fashion_mnist``). The official test part is not touched.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from pathlib import Path

import numpy as np

from intarsia.rng import permutation
from stage1_tokenizer.data.idx import read_idx

SEED, PURPOSE = 2017, "bundled/fashion"
TRAIN, VALIDATION, HELD_OUT = 1_000, 200, 500
COLUMNS = 100


def choose(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sorted original indices: bundled train, bundled validation, and all that full runs hold out."""
    train, validation, held = [], [], []
    for label in range(10):
        mine = np.flatnonzero(labels == label)
        order = mine[permutation(SEED, PURPOSE, len(mine), step=label).numpy()]
        train.append(order[:TRAIN])
        validation.append(order[TRAIN : TRAIN + VALIDATION])
        held.append(order[TRAIN : TRAIN + HELD_OUT])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(validation)), np.sort(np.concatenate(held))


def sheet_of(tiles: np.ndarray) -> np.ndarray:
    """(N, h, w) to one picture with COLUMNS tiles in a row."""
    n, h, w = tiles.shape
    return tiles.reshape(n // COLUMNS, COLUMNS, h, w).transpose(0, 2, 1, 3).reshape(n // COLUMNS * h, COLUMNS * w)


def main() -> None:
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    images, labels = (read_idx(args.root / f"train-{stem}-ubyte.gz") for stem in ("images-idx3", "labels-idx1"))
    train, validation, held = choose(labels)
    rows = np.concatenate([train, validation])
    picture = io.BytesIO()
    Image.fromarray(sheet_of(images[rows])).save(picture, "PNG", optimize=True)
    files = {"fashion.png": picture.getvalue()}
    for name, array in (("fashion.npy", np.stack([labels[rows], rows], 1)), ("holdout-fashion_mnist.npy", held)):
        buffer = io.BytesIO()
        np.save(buffer, array.astype("<u2"), allow_pickle=False)
        files[name] = buffer.getvalue()
    for name, data in files.items():
        (args.out / name).write_bytes(data)
        print(f"{name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
