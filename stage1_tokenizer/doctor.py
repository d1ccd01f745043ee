"""A page on the health of a tokenizer's codes: ``python -m stage1_tokenizer.doctor --run RUN``.

Usage, perplexity, entropy of each position, nearest code pairs, rate against distortion, gradients of encoder and codebook,
quantisation error against the latents' variance, and what to change. Prints it, and writes doctor.png and doctor.json.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from intarsia.cli import UserError, load_tree, parse, run_main
from intarsia.config import Config, ConfigError, Place
from intarsia.files import EVALUATED, finite_or_null, json_bytes, writable_folder, write_atomic
from intarsia.processes import start
from stage1_tokenizer.checkup import Checkup, examine
from stage1_tokenizer.data.base import SOURCES, SourceConfig
from stage1_tokenizer.doctor_page import save_page
from stage1_tokenizer.objectives.base import OBJECTIVES, Objective, ObjectiveConfig
from stage1_tokenizer.objectives.reconstruction import ReconstructionConfig
from stage1_tokenizer.run_data import needed_data, run_config, with_run_data
from stage1_tokenizer.tokenizers.base import Tokenizer

PROGRAM = "python -m stage1_tokenizer.doctor"


class DoctorConfig(Config):
    """Examines a trained tokenizer."""

    tokenizer: Place[Annotated[str, Field(min_length=1)]]
    """A run folder (``--run`` says the same), the folder of a release, or a Hub id (user/name, user/name@revision,
    user/name//subfolder)."""
    data: SourceConfig | None = None
    """The data source; that of the tokenizer's run where it is not given."""
    split: str = "train"
    """What is looked at."""
    samples: Annotated[int, Field(ge=0)] = 5000
    """So many samples, evenly spaced over the split; 0 = all."""
    out: Place[str | None] = None
    """The folder for doctor.png and doctor.json; ``doctor/`` in the run folder where it is not given."""
    device: Place[Literal["auto", "cpu", "cuda"]] = "auto"
    """auto: CUDA where there is one."""


def page(checkup: Checkup) -> list[str]:
    """The page as lines of text."""
    lines = []
    for facts, pairs in zip(checkup.levels, checkup.pairs, strict=True):
        low, mean, high = facts.position_bits
        lines.append(
            f"level {facts.name}: {facts.used} of {facts.in_use} codes used, perplexity {facts.perplexity:.1f},"
            f" {facts.entropy_bits:.2f} bits per code; by position {low:.2f} to {high:.2f}, mean {mean:.2f}"
        )
        lines.append(
            f"  latents: variance {facts.variance:.4g}, quantisation error {facts.error:.4g}"
            f" ({facts.error / max(facts.variance, 1e-12):.0%})"
            + ("" if facts.swap_cost is None else f"; another sample's codes cost {facts.swap_cost:z.1f} dB")
        )
        if pairs:
            lines.append("  nearest codes: " + ", ".join(f"{a} and {b} ({d:.3g})" for a, b, d in pairs))
    for name, norms in checkup.gradients.items():
        lines.append(
            f"gradients of {name}: task {norms['task']:.3g} and quantiser {norms['quantiser']:.3g} at the latents,"
            f" codebook {norms['codebook']:.3g}"
        )
    lines += [f"rate and distortion, {row['kind']}: {row['bits']:.0f} bits per sample, {row['psnr']:.2f} dB" for row in checkup.curve]
    lines.append("what to change:" if checkup.findings else "nothing to change")
    return lines + [f"  {finding.what}\n    try: {finding.try_}" for finding in checkup.findings]


def objective_of(run: Path) -> Objective:
    """The objective that a run was trained for; the default one where the folder is no run."""
    path = run_config(run)
    tree = load_tree(str(path)).get("objective") if path.is_file() else None
    return OBJECTIVES.build(ObjectiveConfig.from_dict(tree) if tree else ReconstructionConfig())


def main(argv: Sequence[str] | None = None) -> None:
    words = [word.replace("--run", "--tokenizer", 1) if word.partition("=")[0] == "--run" else word for word in (argv or sys.argv[1:])]
    config, flags = parse(DoctorConfig, with_run_data(words), program=PROGRAM)
    if flags.max_steps is not None or flags.resume is not None:
        raise ConfigError(["--max_steps, --resume: an examination has no steps"])
    data = needed_data(config.data, config.tokenizer)
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(f"WORLD_SIZE: {world} processes; the doctor runs as one")
    folder = Path(config.tokenizer)
    if config.out is None and not (folder / "config.yaml").is_file():
        raise ConfigError([f"out: {config.tokenizer} is no run folder; say where to write"])
    checked = flags.check or flags.dry_run
    out = writable_folder(folder / "doctor" if config.out is None else config.out, "out", UserError, make=not checked, own=EVALUATED)
    device = start(config.device, 300.0)
    tokenizer = Tokenizer.from_pretrained(config.tokenizer).to(device)
    source = SOURCES.build(data)
    split = source.split(config.split)
    if source.signal != tokenizer.signal:
        raise ConfigError([f"data: the signals are {source.signal}; the tokenizer takes {tokenizer.signal}"])
    if checked:
        return
    checkup = examine(tokenizer, objective_of(folder).to(device), split, config.samples)
    print(*page(checkup), sep="\n")
    tree: dict[str, Any] = {
        "levels": [asdict(facts) for facts in checkup.levels],
        "position_bits": [bits.tolist() for bits in checkup.position_bits],
        "nearest_pairs": checkup.pairs,
        "rate_distortion": checkup.curve,
        "gradients": checkup.gradients,
        "findings": [{"what": finding.what, "try": finding.try_} for finding in checkup.findings],
    }
    write_atomic(out / "doctor.json", json_bytes(finite_or_null(tree)))
    save_page(out / "doctor.png", checkup, [level.shape for level in tokenizer.level_specs()])
    print(f"{out / 'doctor.png'} written", flush=True)


if __name__ == "__main__":
    run_main(main)
