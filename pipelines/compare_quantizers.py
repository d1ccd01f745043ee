"""Quantisers side by side: ``python -m pipelines.compare_quantizers --config compare_quantizers/fashion_mnist --out runs/compare``.

Each quantiser is trained with the same nets, data, seed and time through the ordinary commands: its number of steps is what fits
into ``seconds``, so that every learning rate runs its whole schedule. The pace of the first is measured, then what a step of each
other costs beside it, by turns; from then on steps count, and the rest may run on another machine, or several at once (``jobs``).
The best then get a prior each. The same command goes on where it was interrupted; results/NAME.json is written as each is done,
report.md and curve.png likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from intarsia import yaml_io
from intarsia.cli import Flags, UserError, parse, run_main
from intarsia.config import Config, Place
from intarsia.files import json_bytes, read_json, writable_folder, write_atomic
from intarsia.metrics_log import read_metrics
from pipelines.evaluation.features import BUNDLED, load_features
from pipelines.evaluation.settings import HeldOutName
from pipelines.pace import pace, ratio
from pipelines.quantizer_report import curve, report
from pipelines.stages import prior_config, run_command, said_of, tokenizer_config
from stage1_tokenizer.data.base import SOURCES
from stage1_tokenizer.quantizers.base import QuantizerConfig
from stage1_tokenizer.run_data import run_data

PROGRAM = "python -m pipelines.compare_quantizers"
SET = ("run", "steps", "config", "tokenizer", "tokenizer.type", "check", "dry_run", "max_steps", "resume", "help")


class EntryConfig(Config):
    """One quantiser of the comparison."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """How it is called in the table; a folder too."""
    quantizer: QuantizerConfig
    """What is compared."""
    flags: tuple[str, ...] = ()
    """Further flags of its training, such as --tokenizer.by_depth=true; what is compared, the data and steps are not theirs."""
    ranked: bool = True
    """Takes part in the choice of the best, which get a prior."""

    def model_post_init(self, context: object) -> None:
        for flag in self.flags:
            name = flag.removeprefix("--").partition("=")[0]
            if flag.startswith("--") and (name in SET or f"{name}.".startswith(("data.", "tokenizer.quantizer."))):
                raise ValueError(f"flags: {flag!r} of the entry {self.name!r}; the comparison itself sets {name}")


class CompareConfig(Config):
    """Trains and evaluates several quantisers alike."""

    tokenizer: str
    """Configuration of the tokenizer's training; only its quantiser, its steps and what an entry's flags say are replaced."""
    quantizers: tuple[EntryConfig, ...]
    """What is compared."""
    data: tuple[str, ...] = ()
    """Flags for the data, such as --data.root=DIR."""
    split: HeldOutName = "test"
    """What is reconstructed in the end."""
    seconds: Annotated[float, Field(gt=0)] = 600
    """Training of each tokenizer, on the machine that measured the paces."""
    prior: str = ""
    """Configuration of the priors' training; none are trained where empty."""
    prior_seconds: Annotated[float, Field(gt=0)] = 600
    """Training of each prior, likewise."""
    best: Annotated[int, Field(ge=0)] = 4
    """So many tokenizers, the best by PSNR of their last validation, get a prior."""
    samples: Annotated[int, Field(ge=10)] = 5000
    """Samples of each prior that are compared with real images."""
    features: str = ""
    """The feature model for that; the bundled one where empty."""
    out: Place[Annotated[str, Field(min_length=1)]] = "runs/compare"
    """The folder for everything."""
    jobs: Place[Annotated[int, Field(ge=1)]] = 1
    """So many trainings at once, each on its share of the cores; what they print goes to NAME/log.txt where it is more than one."""

    def model_post_init(self, context: object) -> None:
        names = [entry.name for entry in self.quantizers]
        if len(set(names)) < len(names) or not names:
            raise ValueError(f"quantizers: the names {', '.join(names) or '(none)'}; expected one or more, all different")
        if "results" in names:
            raise ValueError("quantizers: the name 'results'; the folder of that name holds the figures")


def bound(tree: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration what decides the trained tokenizers and their figures; a folder holds those of one."""
    entries = [{key: entry.get(key) or [] for key in ("name", "quantizer", "flags")} for entry in tree.get("quantizers") or ()]
    return {key: tree.get(key) for key in ("tokenizer", "data", "split", "seconds")} | {"quantizers": entries}


def tokenizer_training(config: CompareConfig, entry: EntryConfig) -> list[str]:
    """The command that trains a tokenizer, without its folder and its steps."""
    tree = yaml_io.dump(entry.quantizer.to_dict())
    return ["stage1_tokenizer.train", "--config", config.tokenizer, *config.data, f"--tokenizer.quantizer={tree}", *entry.flags]


class Comparison:
    """The commands of a comparison and what they leave in its folder. Raises UserError for a folder of another comparison.

    Args:
        make: make the folders and write the plan; else only look.
    """

    def __init__(self, config: CompareConfig, out: Path, imports: Sequence[str] = (), *, make: bool = True) -> None:
        self.config, self.out = config, out
        self.imports = [f"--import={name}" for name in imports]
        path, plan = out / "plan.json", bound(config.to_dict())
        if path.is_file():
            before = bound(read_json(path, UserError).get("config", {}))
            if changed := [key for key in plan if before[key] != plan[key]]:
                raise UserError(f"out: {out} holds a comparison with other {', '.join(changed)}; take another folder")
        stale = self.stale()
        if not make:
            return
        write_atomic(path, json_bytes({"config": plan}))  # first: it shows whose folder this is
        for name in stale:
            self.save({key: value for key, value in self.result(name).items() if key not in ("prior_steps", "asked")})
        for name in ("results", *(entry.name for entry in config.quantizers)):
            (out / name).mkdir(parents=True, exist_ok=True)

    def stale(self) -> list[str]:
        """The quantisers whose prior is not done and is now asked for otherwise: its steps are to be measured anew.

        Raises UserError where one is done: it would not compare with the others.
        """
        asked = {entry.name: self.result(entry.name).get("asked", {}) for entry in self.config.quantizers}
        others = {name: [key for key in was if was[key] != getattr(self.config, key)] for name, was in asked.items() if self.config.prior}
        for name, keys in others.items():
            if keys and "prior" in self.result(name):
                raise UserError(f"out: {self.out} holds a prior of {name} with other {', '.join(keys)}; take another folder")
        return [name for name, keys in others.items() if keys]

    def result(self, name: str) -> dict[str, Any]:
        path = self.out / "results" / f"{name}.json"
        return read_json(path, UserError) if path.is_file() else {"name": name}

    def save(self, result: dict[str, Any]) -> None:
        write_atomic(self.out / "results" / f"{result['name']}.json", json_bytes(result))

    def run(self, name: str, arguments: Sequence[str]) -> float:
        """``run_command`` for one quantiser."""
        jobs = self.config.jobs
        return run_command([*arguments, *self.imports], log=self.out / name / "log.txt" if jobs > 1 else None, jobs=jobs)

    def plan(self, key: str, seconds: float, entries: Sequence[EntryConfig], training: Callable[[EntryConfig], list[str]]) -> None:
        """Measures how many steps each training gets, and keeps it as ``key``; nothing where that is known already.

        The first gets those that fit into ``seconds``, the others those that take as long as these.
        """
        first = entries[0]
        reference = [*training(first), *self.imports]
        for entry in entries:
            result = self.result(entry.name)
            if key in result:
                continue
            if entry is first:
                steps = seconds / pace(reference)
            else:
                steps = self.result(first.name)[key] / ratio([*training(entry), *self.imports], reference)
            asked = {"asked": {name: getattr(self.config, name) for name in ("prior", "prior_seconds")}} if key == "prior_steps" else {}
            self.save(result | {"quantizer": entry.quantizer.to_dict(), key: max(1, round(steps))} | asked)
            print(f"{entry.name}: {key.replace('_', ' ')} in {seconds:g} s: {max(1, round(steps)):,}", flush=True)

    def train_tokenizer(self, entry: EntryConfig) -> float:
        """Trains one tokenizer for its steps, or for those that are missing; the seconds that it took."""
        run = str(self.out / entry.name / "tokenizer")
        training = tokenizer_training(self.config, entry)
        return self.run(entry.name, [*training, "--run", run, "--steps", str(self.result(entry.name)["steps"])])

    def tokenizer(self, entry: EntryConfig) -> None:
        """Trains and evaluates one tokenizer; nothing where it is done already."""
        result, run = self.result(entry.name), str(self.out / entry.name / "tokenizer")
        if "tokenizer" in result:
            return
        result["seconds"] = result.get("seconds", 0.0) + self.train_tokenizer(entry)
        self.save(result)
        out = f"{run}/evaluation/{self.config.split}"
        self.run(entry.name, ["stage1_tokenizer.evaluate", "--tokenizer", run, "--split", self.config.split, "--out", out])
        found = read_json(Path(out) / "evaluation.json", UserError)
        result["tokenizer"] = {"reconstruction": found["reconstruction"], "codes": found["codes"], "prefixes": found.get("prefixes", [])}
        validated = [line["validation/psnr"] for line in read_metrics(Path(run) / "metrics.jsonl") if "validation/psnr" in line]
        result["validation_psnr"] = validated[-1] if validated else None
        self.save(result)

    def prior_training(self, entry: EntryConfig) -> list[str]:
        """The command that trains a prior, without its folder and its steps."""
        return ["stage2_prior.train", "--config", self.config.prior, "--codes", str(self.out / entry.name / "codes")]

    def encode(self, entry: EntryConfig) -> None:
        """The codes of one tokenizer, which is trained again where only its figures are here; nothing where its prior is done."""
        if "prior" in self.result(entry.name):
            return
        folder = self.out / entry.name
        self.train_tokenizer(entry)  # nothing where it is here and done
        self.run(entry.name, ["stage1_tokenizer.encode", "--tokenizer", str(folder / "tokenizer"), "--out", str(folder / "codes")])

    def prior(self, entry: EntryConfig) -> None:
        """Trains a prior on the codes of one tokenizer and evaluates samples; nothing where it is done already."""
        name, folder = entry.name, self.out / entry.name
        result = self.result(name)
        if "prior" in result:
            return
        tokenizer, run, pipeline, out = (str(folder / part) for part in ("tokenizer", "prior", "pipeline", "evaluation"))
        seconds = self.run(name, [*self.prior_training(entry), "--run", run, "--steps", str(result["prior_steps"])])
        result["prior_seconds"] = result.get("prior_seconds", 0.0) + seconds
        self.save(result)
        self.run(name, ["pipelines.assemble", "--tokenizer", tokenizer, "--priors", run, "--out", pipeline, "--overwrite=true"])
        features = ["--features", self.config.features] if self.config.features else []
        evaluation = ["--split", self.config.split, "--n", str(self.config.samples), "--out", out, *features]
        self.run(name, ["pipelines.evaluate", "--pipeline", pipeline, f"--data={run_data(Path(tokenizer))}", *evaluation])
        found = read_json(Path(out) / "evaluation.json", UserError, 1 << 24)
        result["prior"] = {"bits": found["bits"], "samples": found["samples"]}
        result["asked"] = {key: getattr(self.config, key) for key in ("prior", "prior_seconds", "samples", "features")}
        self.save(result)

    def each(self, work: Callable[[EntryConfig], None], entries: Sequence[EntryConfig]) -> None:
        """``work`` on all entries, ``jobs`` at once, and a report after each. Once one fails, no other begins."""
        if self.config.jobs == 1:
            for entry in entries:
                work(entry)
                self.report()
            return
        with ThreadPoolExecutor(self.config.jobs) as pool:
            futures = [pool.submit(work, entry) for entry in entries]
            try:
                for future in as_completed(futures):
                    future.result()
                    self.report()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def report(self) -> None:
        """report.md and curve.png of what is there."""
        results = [self.result(entry.name) for entry in self.config.quantizers]
        done = [result for result in results if "tokenizer" in result]
        write_atomic(self.out / "report.md", report(done).encode())
        curve(self.out / "curve.png", done)

    def chosen(self) -> list[EntryConfig]:
        """The best by PSNR of their last validation, which spares ``split``; by that of ``split`` where some trained without."""
        ranked = [entry for entry in self.config.quantizers if entry.ranked]
        results = {entry.name: self.result(entry.name) for entry in ranked}
        quality: dict[str, Any] = {name: result.get("validation_psnr") for name, result in results.items()}
        if None in quality.values():
            quality = {name: result["tokenizer"]["reconstruction"]["psnr"] for name, result in results.items()}
        return sorted(ranked, key=lambda entry: -quality[entry.name])[: self.config.best]


def check_parts(config: CompareConfig) -> None:
    """Raises ConfigError or DataError, before anything runs, for a configuration, a quantiser, data, a split or a feature model that is not
    there or is wrong."""
    for entry in config.quantizers:
        trained = tokenizer_config([*tokenizer_training(config, entry)[1:], "--run", config.out])
    source = SOURCES.build(trained.data)
    with said_of("split"):
        source.split(config.split)
    if config.prior and config.best:
        prior_config(["--config", config.prior, "--codes", config.out, "--run", config.out])
        with said_of("features"):
            load_features(config.features or BUNDLED, source.signal)


def compare(config: CompareConfig, flags: Flags) -> None:
    """The paces, all tokenizers, then the priors of the best, each only where it is not done yet."""
    if flags.max_steps is not None or flags.resume is not None:
        raise UserError("--max_steps, --resume: a comparison has no steps of its own; the same command goes on")
    checked = flags.check or flags.dry_run
    out = writable_folder(config.out, "out", UserError, make=not checked, own=("plan.json", "results"))
    check_parts(config)
    comparison = Comparison(config, out, flags.imports, make=not checked)
    if checked:
        priors = min(config.best, sum(entry.ranked for entry in config.quantizers)) if config.prior else 0
        print(f"{len(config.quantizers)} quantisers of {config.seconds:g} s, {priors} priors of {config.prior_seconds:g} s")
        return
    comparison.plan("steps", config.seconds, config.quantizers, partial(tokenizer_training, config))
    comparison.each(comparison.tokenizer, config.quantizers)
    if config.prior and (chosen := comparison.chosen()):
        for entry in chosen:
            comparison.encode(entry)
        comparison.plan("prior_steps", config.prior_seconds, chosen, comparison.prior_training)
        comparison.each(comparison.prior, chosen)
    print((Path(config.out) / "report.md").read_text())


def main(argv: list[str] | None = None) -> None:
    compare(*parse(CompareConfig, argv, program=PROGRAM))


if __name__ == "__main__":
    run_main(main)
