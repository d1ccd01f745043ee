"""Writes the codes of a data set: ``accelerate launch -m stage1_tokenizer.encode --tokenizer runs/tok --out runs/codes``.

Any number of processes writes the same bytes. A killed dump goes on where it was when the same command runs again.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from intarsia.cli import RunError, UserError, parse, run_main
from intarsia.codes import CodesWriter, Manifest, SplitPlan
from intarsia.codes_folder import goes_on, is_complete
from intarsia.codes_format import code_dtype
from intarsia.codes_manifest import ShardRange
from intarsia.codes_plan import plan_tree
from intarsia.config import Config, ConfigError, Place, Seed
from intarsia.distributed import Comm, comm
from intarsia.files import DiskFullError
from intarsia.processes import start
from stage1_tokenizer.data.base import SOURCES, Source, SourceConfig
from stage1_tokenizer.run_data import check_signal, needed_data, with_run_data
from stage1_tokenizer.sizes import rows_at_once
from stage1_tokenizer.tokenizers.base import Tokenizer

CHUNK = 256  # rows that are prepared and encoded at once, fewer where they are large; codes do not depend on it
PROGRAM = "python -m stage1_tokenizer.encode"


class EncodeConfig(Config):
    """Encodes all splits of a data set with a trained tokenizer, and writes them as a set of codes."""

    tokenizer: Place[Annotated[str, Field(min_length=1)]]
    """A run folder, the folder of a release, or a Hub id: user/name, user/name@revision, user/name//subfolder."""
    out: Place[Annotated[str, Field(min_length=1)]]
    """The folder of codes. Running the same command again completes it."""
    data: SourceConfig | None = None
    """The data source; that of the tokenizer's run where it is not given, with ``--data.*`` flags on top of it."""
    views: Annotated[int, Field(ge=1)] = 1
    """Copies of each train sample; all but the first are augmented by the data's transform."""
    seed: Seed = 0
    """Root of the augmentation."""
    shard_rows: Annotated[int, Field(ge=1)] = 4096
    """Rows per file."""
    device: Place[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: CUDA where there is one."""
    timeout: Place[Annotated[float, Field(gt=0)]] = 3600.0
    """Seconds after which a process that waits for another gives up."""


@dataclass(frozen=True)
class Encoded:
    """A shard's codes on the CPU, and its labels."""

    shard: ShardRange
    codes: list[Tensor]
    label: Tensor | None


def dump_codes(
    tokenizer: Tokenizer,
    source: Source,
    out: str | Path,
    *,
    views: int = 1,
    seed: int = 0,
    shard_rows: int = 4096,
    comm: Comm = comm,
    progress: bool = False,
) -> Manifest:
    """Encodes every split of ``source`` and writes ``out``; each rank calls it. Augmented views are of train alone.

    Reading, encoding and writing overlap: batches are prepared and shards written by one thread each.

    Raises:
        CodesError: ``out`` holds shards of another tokenizer or other data, or something else.
        ValueError: the signals are not those that the tokenizer was trained on, or a sample is not finite.
    """
    writer = CodesWriter(out, tokenizer.level_specs(), **dump_plan(tokenizer, source, views, seed), shard_rows=shard_rows, comm=comm)
    shards = writer.mine()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writing, _bar(shards, progress and comm.rank == 0) as bar:
        pending: Future[None] | None = None
        for done in _encode(tokenizer, source, shards, seed, reader, bar):
            if pending is not None:
                pending.result()
            pending = writing.submit(writer.write_shard, done.shard, done.codes, done.label, captions_of(source, done.shard))
        if pending is not None:
            pending.result()
    return writer.close()


def dump_plan(tokenizer: Tokenizer, source: Source, views: int, seed: int) -> dict[str, Any]:
    """What ``CodesWriter`` is told besides folder and levels. Raises ValueError where the tokenizer takes other signals."""
    check_signal(tokenizer, source)
    plans = {}
    for name in source.splits:
        split = source.split(name)
        labelled, captioned = split.labels is not None, split.captions is not None
        plans[name] = SplitPlan(len(split), views if name == "train" else 1, labelled, captioned)
    return {
        "signal": tokenizer.signal,
        "tokenizer": {"type": tokenizer.type_name, "fingerprint": tokenizer.fingerprint},
        "splits": plans,
        "classes": source.classes if any(plan.labelled for plan in plans.values()) else (),
        "data": source.describe() | ({"seed": seed} if views > 1 else {}),
    }


def captions_of(source: Source, shard: ShardRange) -> list[str] | None:
    """The captions of a shard's rows; None where the source has none. Every view of a sample has the sample's."""
    split = source.split(shard.split)
    return None if split.captions is None else [split.captions[i] for i in shard.rows(len(split))[0].tolist()]


def _bar(shards: list[ShardRange], shown: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=sum(s.stop - s.start for s in shards), unit="row", desc="encode", disable=None if shown else True)


def _encode(
    tokenizer: Tokenizer, source: Source, shards: list[ShardRange], seed: int, reader: ThreadPoolExecutor, bar: Any
) -> Iterator[Encoded]:
    """The codes of each shard; the next batch is prepared while one is encoded."""

    def read(shard: ShardRange, rows: slice) -> dict[str, Tensor]:
        split = source.split(shard.split)
        index, view = (torch.from_numpy(a) for a in shard.rows(len(split)))
        return _batch(split, index[rows], view[rows], seed)

    size = rows_at_once(tokenizer.signal, tokenizer.config.micro_batch, CHUNK)
    chunks = [
        (shard, slice(start, min(start + size, shard.stop - shard.start)))
        for shard in shards
        for start in range(0, shard.stop - shard.start, size)
    ]
    ahead = [reader.submit(read, *chunk) for chunk in chunks[:2]]
    parts: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for number, (shard, rows) in enumerate(chunks):
        batch = ahead.pop(0).result()
        if number + 2 < len(chunks):
            ahead.append(reader.submit(read, *chunks[number + 2]))
        parts.append([c.cpu() for c in tokenizer.encode(batch["x"].to(tokenizer.device))])
        if "label" in batch:
            labels.append(batch["label"])
        bar.update(rows.stop - rows.start)
        if rows.stop == shard.stop - shard.start:
            yield Encoded(shard, [torch.cat(level) for level in zip(*parts, strict=True)], torch.cat(labels) if labels else None)
            parts, labels = [], []


def _batch(split: Any, index: Tensor, view: Tensor, seed: int) -> dict[str, Tensor]:
    """The samples ``index`` in their views; a batch may end one view and begin the next."""
    found = [split.batch(index[view == v], seed=seed, view=int(v)) for v in view.unique()]
    return {key: torch.cat([part[key] for part in found]) for key in ("x", "label") if key in found[0]}


def space_needed(tokenizer: Tokenizer, source: Source, views: int) -> int:
    """Bytes that the dump may take at most, roughly."""
    per_row = 32 + sum(level.positions * code_dtype(level.vocab).itemsize for level in tokenizer.level_specs())
    return sum(len(source.split(name)) * (views if name == "train" else 1) for name in source.splits) * per_row


def summary(manifest: Manifest) -> str:
    """Rows, and for each level the codes in use and their perplexity, a line per split and level."""
    lines = [f"codes of the {manifest.tokenizer.type} {manifest.tokenizer.fingerprint[:12]}"]
    for split in manifest.splits:
        lines.append(f"{split.name}: {split.samples} samples" + (f" in {split.views} views" if split.views > 1 else ""))
        for level, used, perplexity in zip(manifest.levels, split.usage, split.perplexity, strict=True):
            grid = "x".join(map(str, level.shape))
            lines.append(f"  {level.name} {grid}: {used} of {level.vocab} codes used, perplexity {perplexity:g}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config, flags = parse(EncodeConfig, with_run_data(list(sys.argv[1:] if argv is None else argv)), program=PROGRAM)
    if flags.max_steps is not None or flags.resume is not None:
        raise ConfigError(["--max_steps, --resume: a dump has no steps; the same command again completes it"])
    data = needed_data(config.data, config.tokenizer)
    if config.views > 1 and not data.transform.augments:
        raise ConfigError([f"views: {config.views} of data that are not augmented would be alike; set data.transform.flip, shift or crop"])
    device = start(config.device, config.timeout)
    tokenizer = Tokenizer.from_pretrained(config.tokenizer)
    source = SOURCES.build(data)
    rows = ", ".join(f"{len(source.split(name))} {name}" for name in source.splits)
    if comm.rank == 0:
        print(f"{tokenizer.type_name} {tokenizer.fingerprint[:12]}: {rows}; {comm.world_size} process(es)", flush=True)
    parent = next(p for p in Path(config.out).absolute().parents if p.exists())
    there = sum(file.stat().st_size for file in Path(config.out).rglob("*.parquet"))
    needed, free = space_needed(tokenizer, source, config.views) - there, shutil.disk_usage(parent).free
    if free < needed and not flags.allow_low_space:
        raise UserError(f"out: {config.out}: {needed} bytes are needed, {free} are free; --allow_low_space starts anyway")
    if flags.check or flags.dry_run:
        plan = plan_tree(tokenizer.level_specs(), **dump_plan(tokenizer, source, config.views, config.seed), shard_rows=config.shard_rows)
        if not is_complete(Path(config.out), plan):
            goes_on(Path(config.out), plan)
        return
    tokenizer = tokenizer.to(device)
    try:
        manifest = dump_codes(
            tokenizer, source, config.out, views=config.views, seed=config.seed, shard_rows=config.shard_rows, progress=True
        )
    except DiskFullError as error:
        raise RunError(f"{error}; the same command goes on from here") from error
    if comm.rank == 0:
        print(summary(manifest), flush=True)


if __name__ == "__main__":
    run_main(main)
