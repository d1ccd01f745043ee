"""Folders of images: with a folder per class, or flat and unlabelled, in one set or in folders per split."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from intarsia.config import ConfigError, Place
from intarsia.files import IMAGES
from stage1_tokenizer.data.base import SOURCES, DataError
from stage1_tokenizer.data.decoded import FileItems
from stage1_tokenizer.data.preflight import DecodedConfig, DecodedSource, Part

SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


class FolderConfig(DecodedConfig):
    """A folder of images. Class folders give the labels, in the order of their names."""

    root: Place[str] = ""
    """The folder."""
    layout: Literal["auto", "classes", "flat"] = "auto"
    """Below the folder, or below each split's: a folder per class, or images without labels at any depth; auto: what is there."""
    splits: Literal["auto", "folders", "none"] = "auto"
    """folders: the folder holds train/ and perhaps validation/ and test/; none: those are names of classes; auto: by their presence."""
    captions: bool = False
    """Read the caption of ``name.jpg`` from ``name.txt`` beside it; every image needs one."""


@SOURCES.register("folder", FolderConfig)
class FolderSource(DecodedSource):
    """The images below a folder, in the order of their names.

    Attributes:
        outside: suffix -> the number of files that are not taken: no images by their names, or images beside class folders.
    """

    config: FolderConfig

    def __init__(self, config: FolderConfig) -> None:
        super().__init__(config)
        if not config.root:
            raise ConfigError(["data.root: the folder of the images is needed"])
        if not os.path.isdir(config.root):
            raise DataError(f"data.root: {config.root!r} is no folder")
        roots = split_folders(config.root, config.splits)
        outside: list[str] = []
        found = {name: list_images(root, config.layout, outside) for name, root in roots.items()}
        if config.root not in roots.values():
            outside += [os.path.join(config.root, e.name) for e in _entries(config.root) if not _is_folder(e)]
        kinds = {name: classes is not None for name, (_, classes) in found.items()}
        if len(set(kinds.values())) > 1:
            flat = next(name for name, labelled in kinds.items() if not labelled)
            raise DataError(f"data.root: {roots[flat]!r} has no class folders, the other splits have; set layout")
        classes = tuple(found["train"][1] or ())
        if len(classes) == 1 and config.layout == "auto":
            where = f"data.root: {roots['train']!r} holds one class folder only, {classes[0]!r}"
            raise DataError(f"{where}; set layout to flat for unlabelled images, or to classes")
        parts, read = {}, set[str]()
        for name, (names, own) in found.items():
            labels = None
            if own is not None:
                unknown = [c for c in own if c not in classes]
                if unknown:
                    raise DataError(f"data.root: {roots[name]!r} has the class folder {unknown[0]!r}, which the train split lacks")
                place = {c: i for i, c in enumerate(classes)}
                labels = torch.tensor([place[n.split("/", 1)[0]] for n in names])
            captions = [read_caption(roots[name], image) for image in names] if config.captions else None
            if config.captions:
                read |= {str(Path(roots[name], image).with_suffix(".txt")) for image in names}
            parts[name] = Part(FileItems(roots[name], names), labels, captions)
        self.outside = Counter(os.path.splitext(path)[1].lower() or "no suffix" for path in outside if str(Path(path)) not in read)
        self._look(parts, classes)

    def summary(self) -> list[str]:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(self.outside.items()))
        return super().summary() + ([f"no images by their names or places, left out: {counts}"] if counts else [])

    def _identity(self) -> dict[str, Any]:
        return {"type": "folder"}


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Entries that are not hidden, in the order of the bytes of their names."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: os.fsencode(e.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink to itself; opening it as a file says so
        return False


def split_folders(root: str, splits: str) -> dict[str, str]:
    """Split -> folder. Raises DataError where split folders and others stand side by side and ``splits`` does not say."""
    folders = [e.name for e in _entries(root) if _is_folder(e)]
    named = [n for n in folders if n.lower() in SPLIT_NAMES]
    if splits == "none" or (splits == "auto" and "train" not in [SPLIT_NAMES[n.lower()] for n in named]):
        return {"train": root}
    others = [n for n in folders if n not in named]
    if splits == "auto" and others:
        raise DataError(
            f"data.root: {root!r} holds {named[0]!r} and {others[0]!r}; "
            "set splits to folders (only those of the splits are taken) or none (all are classes)"
        )
    found: dict[str, str] = {}
    for name in named:
        split = SPLIT_NAMES[name.lower()]
        if split in found:
            raise DataError(f"data.root: {root!r} holds two folders for the split {split!r}")
        found[split] = os.path.join(root, name)
    if "train" not in found:
        raise DataError(f"data.root: {root!r} holds no folder train; set splits to none if it is not divided")
    return found


def list_images(root: str, layout: str, outside: list[str]) -> tuple[list[str], list[str] | None]:
    """Relative names of the images, with "/" between folders, and the class folders (None for a flat layout).

    The paths of all other files go to ``outside``; hidden ones do not count.

    Raises DataError for an empty folder, a class without images, images beside class folders, and loops of symlinks.
    """
    entries = _entries(root)
    folders = [e.name for e in entries if _is_folder(e)]
    files = [e.name for e in entries if not _is_folder(e)]
    loose = [name for name in files if name.lower().endswith(IMAGES)]
    if layout == "auto" and folders and loose:
        raise DataError(f"data.root: {root!r} holds images ({loose[0]!r}) beside folders ({folders[0]!r}); set layout to flat or classes")
    if layout == "flat" or (layout == "auto" and not folders):
        names = list(_walk(root, "", (), outside))
        if not names:
            raise DataError(f"data.root: {root!r} holds no images ({', '.join(IMAGES)})")
        return names, None
    if not folders:
        raise DataError(f"data.root: {root!r} holds no class folders; set layout to flat for unlabelled images")
    names = []
    for folder in folders:
        mine = list(_walk(root, folder, (), outside))
        if not mine:
            raise DataError(f"data.root: the class folder {os.path.join(root, folder)!r} holds no images")
        names += mine
    outside += [os.path.join(root, name) for name in files]
    return names, folders


def read_caption(root: str, image: str) -> str:
    """The text beside an image, without the white space around it. Raises DataError where it is missing, empty or no UTF-8."""
    path = Path(root, image).with_suffix(".txt")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise DataError(f"data.captions: {str(path)!r}, the caption of {image!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"data.captions: {str(path)!r} is no UTF-8 text") from None
    if not text:
        raise DataError(f"data.captions: {str(path)!r} is empty")
    return text


def _walk(root: str, below: str, above: tuple[tuple[int, int], ...], outside: list[str]) -> Iterator[str]:
    folder = Path(root, below)
    facts = folder.stat()
    here = (facts.st_dev, facts.st_ino)
    if here in above:
        raise DataError(f"data.root: {str(folder)!r} is a symlink to a folder above it, a loop")
    for entry in _entries(str(folder)):
        name = f"{below}/{entry.name}" if below else entry.name
        if _is_folder(entry):
            yield from _walk(root, name, (*above, here), outside)
        elif entry.name.lower().endswith(IMAGES):
            yield name
        else:
            outside.append(os.path.join(root, name))
