"""The conformance kit: every registered quantiser passes, and each planted fault fails exactly the check that is there for it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from intarsia.cli import UserError
from intarsia.config import ConfigError
from intarsia.distributed import Comm
from stage1_tokenizer.quantizers.base import QUANTIZERS, Quantized, Quantizer, QuantizerConfig, straight_through
from stage1_tokenizer.quantizers.bsq import BSQConfig
from stage1_tokenizer.quantizers.conformance import CHECKS, Adapter, Traits, check, nearest_code, traits_of
from stage1_tokenizer.quantizers.conformance.__main__ import main
from stage1_tokenizer.quantizers.conformance.report import Violation
from stage1_tokenizer.quantizers.conformance.subject import Subject
from stage1_tokenizer.quantizers.fsq import FSQConfig
from stage1_tokenizer.quantizers.gumbel import GumbelConfig
from stage1_tokenizer.quantizers.lfq import LFQConfig
from stage1_tokenizer.quantizers.product import ProductConfig
from stage1_tokenizer.quantizers.residual import ResidualConfig
from stage1_tokenizer.quantizers.simvq import SimVQ, SimVQConfig
from stage1_tokenizer.quantizers.vq import VQ, VQConfig
from tests.plain_faults import FAULTS
from tests.plain_vq import BETA, GAMMA, PlainVQ

ROOT = Path(__file__).resolve().parent.parent
TRAITS = nearest_code(beta=BETA, codebook=0.0, ema=GAMMA, restart=True)
SMALL = VQConfig(codes=16, dim=4, decay=0.8)
CONFIGS: dict[str, QuantizerConfig] = {
    "vq": SMALL,
    "vq/gradient": SMALL.replace(update="gradient"),
    "vq/cosine": SMALL.replace(cosine=True),
    "vq/rotation": SMALL.replace(estimator="rotation"),
    "vq/no restart": SMALL.replace(restart=0.0),
    "vq/grow": SMALL.replace(grow=(1000, 2000)),
    "vq/no memory": VQConfig(codes=12, dim=4, decay=0.0),
    "gumbel": GumbelConfig(codes=16, dim=4),
    "gumbel/soft": GumbelConfig(codes=16, dim=4, hard=False),
    "simvq": SimVQConfig(codes=16, dim=4),
    "fsq": FSQConfig(levels=(8, 6, 5)),
    "lfq": LFQConfig(bits=6),
    "lfq/groups": LFQConfig(bits=7, group=3),
    "bsq": BSQConfig(bits=6),
    "product": ProductConfig(groups=2, inner=SMALL),
    "product/fsq": ProductConfig(groups=2, inner=FSQConfig(levels=(5, 4))),
    "residual": ResidualConfig(stages=3, inner=SMALL, dropout=0.5),
    "residual/shallow": ResidualConfig(stages=3, inner=SMALL, dropout=0.5, shallow_gradient=0.25),
    "residual/shared": ResidualConfig(stages=2, inner=SMALL, shared=True),
    "residual/fsq": ResidualConfig(stages=2, inner=FSQConfig(levels=(5, 5))),
    "residual/lfq": ResidualConfig(stages=3, inner=LFQConfig(bits=4), shared=True, dropout=1.0),
    "residual/gumbel": ResidualConfig(stages=2, inner=GumbelConfig(codes=16, dim=4)),
    "residual/product": ResidualConfig(stages=2, inner=ProductConfig(groups=2, inner=SMALL), dropout=0.3),
}


def test_every_registered_type_is_here() -> None:
    ours = {name for name in QUANTIZERS.names() if QUANTIZERS.get(name).__module__.startswith("stage1_tokenizer.")}
    assert {str(config.type_name) for config in CONFIGS.values()} == ours


@pytest.mark.parametrize("name", CONFIGS)
def test_a_registered_quantiser_passes(name: str) -> None:
    report = check(CONFIGS[name], name=name)
    print(report)  # with -s: every skip and its reason
    assert report.ok, report
    assert all(report.skipped.values()), "a skip says why"


def test_the_plain_quantiser_passes_and_nothing_but_prefixes_is_skipped() -> None:
    report = check(PlainVQ, traits=TRAITS)
    assert report.ok, report
    assert set(report.skipped) == {"prefixes"}, report


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda cls: cls.__name__)
def test_a_planted_fault_fails_exactly_its_own_check(faulty: type[PlainVQ]) -> None:
    report = check(faulty, traits=TRAITS)
    assert report.failed == (FAULTS[faulty],), report


def test_every_check_sees_a_planted_fault() -> None:
    assert set(CHECKS) - set(FAULTS.values()) == {"prefixes"} and len(FAULTS) >= 12


class Shifted(VQ):
    """Codes off by one, both ways: no round trip notices, the distances do."""

    def forward(self, z: Any, rng: Any = None, active: Any = None) -> Quantized:
        out = super().forward(z, rng, active)
        codes = ((out.codes[0] + 1) % self.config.codes,)
        vectors = self.decode(codes)
        return Quantized(straight_through(z, vectors), codes, self.config.beta * (z - vectors).square().mean())


class BetaSwapped(VQ):
    """beta on the codebook term, 1 on the commitment."""

    def forward(self, z: Any, rng: Any = None, active: Any = None) -> Quantized:
        out = super().forward(z, rng, active)
        vectors = self.decode(out.codes)
        loss = (z - vectors.detach()).square().mean() + self.config.beta * (z.detach() - vectors).square().mean()
        return Quantized(out.z, out.codes, loss)


class Leaking(VQ):
    """z + e - sg[z]: the task's gradient reaches the codebook, too."""

    def forward(self, z: Any, rng: Any = None, active: Any = None) -> Quantized:
        out = super().forward(z, rng, active)
        return Quantized(Through.apply(z, self.decode(out.codes)), out.codes, out.loss, out.stats)


class Through(torch.autograd.Function):
    """The second argument, with the gradient to both."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
        return z_q.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], grads[0]


class Unreduced(VQ):
    """Each rank believes that it is alone."""

    def update(self, rng: Any, comm: Any) -> dict[str, torch.Tensor]:
        return super().update(rng, Alone())


class Alone(Comm):
    """One process, whatever there is."""

    world_size = 1
    rank = 0

    def all_reduce_sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    all_reduce_min_ = gather_rows = all_reduce_sum_


@pytest.mark.parametrize(
    ("faulty", "config", "failed"),
    [
        (Shifted, SMALL, ("nearest",)),
        (BetaSwapped, SMALL.replace(update="gradient"), ("loss_terms",)),
        (Unreduced, SMALL, ("two_ranks",)),
        (Leaking, SMALL.replace(update="gradient"), ("gradient_of_z",)),
    ],
)
def test_faults_in_the_librarys_own_class_are_seen(faulty: type[VQ], config: VQConfig, failed: tuple[str, ...]) -> None:
    report = check(lambda: faulty(config), traits=traits_of(VQ(config)), only=("nearest", "loss_terms", "gradient_of_z", "two_ranks"))
    assert set(report.failed) == set(failed), report


class PerCode(torch.autograd.Function):
    """table[codes]; the gradient of a code is the mean over its uses, not their sum."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.codes = len(table)
        return table[codes]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (codes,) = ctx.saved_tensors
        count = torch.bincount(codes, minlength=ctx.codes).clamp_min(1)[:, None]
        return grads[0].new_zeros((ctx.codes, grads[0].shape[1])).index_add_(0, codes, grads[0]) / count, None


class OwnCount(VQ):
    """The codebook's gradient is divided by the micro-batch's own count; its loss is the paper's."""

    def forward(self, z: Any, rng: Any = None, active: Any = None) -> Quantized:
        out = super().forward(z, rng, active)
        rows, codes = z.to(out.z.dtype).movedim(1, -1).flatten(0, -2), out.codes[0].flatten()
        chosen = PerCode.apply(self.codebook.to(rows.dtype), codes)
        keep = torch.ones(len(z), dtype=torch.bool) if active is None else active
        keep = keep.repeat_interleave(len(rows) // len(z))[:, None]
        term = ((rows.detach() - chosen).square() * keep).mean() + self.config.beta * ((rows - chosen.detach()).square() * keep).mean()
        return Quantized(out.z, out.codes, term, out.stats)


def test_a_codebook_gradient_that_hangs_on_the_micro_batch_is_seen_by_accumulation_and_by_two_ranks_alone() -> None:
    config = SMALL.replace(update="gradient")
    traits = replace(traits_of(VQ(config)), loss=None)  # the paper's loss would say so, too
    report = check(lambda: OwnCount(config), traits=traits)
    assert report.failed == ("accumulation",), report
    assert "the gradient of codebook" in str(report)
    subject = Subject("own count", lambda: OwnCount(config), traits, processes=False)
    with pytest.raises(Violation, match="two ranks against one process: the gradient of codebook"):
        CHECKS["two_ranks"].run(subject)


class Autocast(SimVQ):
    """The map of the codes is computed as the program around has it."""

    def vectors(self) -> torch.Tensor:
        return self.map(self.basis)  # type: ignore[no-any-return]


def test_decoding_in_half_precision_under_autocast_is_seen() -> None:
    config = SimVQConfig(codes=16, dim=4)
    report = check(lambda: Autocast(config), traits=traits_of(SimVQ(config)), only=("half_precision", "round_trip"))
    assert report.failed == ("half_precision",) and "decode under autocast" in str(report), report


class Unsaved(PlainVQ):
    """Latents are turned by a matrix that is drawn and saved nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = torch.linalg.qr(torch.randn(self.dim, self.dim))[0]

    def choose(self, rows: torch.Tensor) -> torch.Tensor:
        return super().choose(rows @ self.turn.to(rows.dtype))


def test_tensors_in_no_state_dict_are_seen_or_for_an_instance_named() -> None:
    assert check(Unsaved, only=("save_load",)).failed == ("save_load",)
    report = check(Unsaved(), only=("save_load",))
    assert report.ok and "turn: in no state dict, and copied with the instance" in str(report), report
    assert report.outcomes[-1].check == "save_load" and not check(PlainVQ(), only=("save_load",)).outcomes[-1].note


class NoDim(PlainVQ):
    dim = property(lambda self: self.missing)  # type: ignore[assignment]


class NoLevels(PlainVQ):
    def level_specs(self, name: str, grid: tuple[int, ...]) -> Any:
        return Quantizer.level_specs(self, name, grid)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (NoDim, r"NoDim\(\): the kit begins from dim .* and level_specs .*: AttributeError"),
        (NoLevels, r"NoLevels\(\): the kit begins from dim .*: NotImplementedError$"),
        (lambda: torch.nn.Linear(2, 2), "subject: a Linear; expected a Quantizer"),
    ],
)
def test_what_the_kit_cannot_begin_with_is_said_clearly(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(made)


class Flips(PlainVQ):
    """As many codes as said are others where a sample is not the first of its batch."""

    flips = 0

    def forward(self, z: Any, rng: Any = None, active: Any = None) -> Quantized:
        out = super().forward(z, rng, active)
        if not self.training and len(z) == 12:
            codes = out.codes[0].clone()
            codes[5].view(-1)[: self.flips] += 1
            codes %= 12
            return Quantized(self.decode((codes,)), (codes,), out.loss)
        return out


def test_a_handful_of_codes_may_be_ties_where_it_is_not_known_how_they_are_chosen() -> None:
    """Of 20,004 codes."""
    for flips, ok in ((0, True), (3, True), (40, False)):
        report = check(type("Some", (Flips,), {"flips": flips}), traits=Traits(), only=("neighbours",))
        assert report.ok == ok and (f"eval mode: {flips} of 20004 codes depend on" in str(report)) == (flips > 0), report
    report = check(type("Some", (Flips,), {"flips": 3}), traits=TRAITS, only=("neighbours",))
    assert report.failed == ("neighbours",), "another code is farther, as is known of this one"


def residual_with_dropout(**options: Any) -> Adapter:
    class Layer(torch.nn.Module):
        """Two tables; in training each other sample leaves out the second."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("tables", torch.randn(2, 16, 4))

        def lookup(self, codes: Any) -> torch.Tensor:
            parts = [torch.where((c >= 0)[..., None], t[c.clamp_min(0)], 0.0) for c, t in zip(codes, self.tables, strict=True)]
            return parts[0] + parts[1]

    def quantize(layer: Any, z: torch.Tensor) -> Any:
        left, codes = z.detach(), []
        for i, table in enumerate(layer.tables):
            found = torch.cdist(left.double(), table.double()).argmin(-1)
            if i and layer.training:
                found[::2] = -1
            codes.append(found)
            left = left - layer.lookup((found, torch.full_like(found, -1)))
        z_q = layer.lookup(codes).to(z.dtype)
        return z_q, tuple(codes), (z - z_q).square().mean()

    return Adapter(Layer(), 4, (16, 16), quantize, lambda layer, codes: layer.lookup(codes), **options)


def test_a_residual_layer_that_leaves_out_stages_is_judged_by_its_depth_or_says_that_it_cannot_be() -> None:
    report = check(lambda: residual_with_dropout(dropout=True), only=("round_trip", "prefixes"))
    assert report.ok and not report.skipped, report
    report = check(residual_with_dropout, only=("shapes",))
    assert report.failed == ("shapes",) and "wants Adapter(dropout=True)" in str(report)


class Backwards(ResidualConfig.registry.get("residual")):  # type: ignore[misc, union-attr]
    """Leading maps are taken from the end."""

    def decode(self, codes: Any, depth: Any = None) -> torch.Tensor:
        return super().decode(codes if len(codes) == self.count else codes[::-1], depth)


def test_prefixes_of_the_wrong_end_are_seen() -> None:
    config = ResidualConfig(stages=3, inner=SMALL, dropout=0.5)
    assert check(lambda: Backwards(config), only=("prefixes",)).failed == ("prefixes",)


def test_slow_averages_and_stages_that_overshoot_are_no_faults() -> None:
    """Counts at 0.999 say after a thousand steps that a code is dead; unit codes cannot come nearer than 1 and swing."""
    report = check(lambda: VQ(VQConfig(codes=16, dim=4, decay=0.999)), only=("restart_raises_usage", "restart_is_whole"))
    assert report.ok, report
    swinging = ResidualConfig(stages=6, dropout=0.5, inner=VQConfig(codes=16, dim=4, cosine=True))
    assert check(lambda: QUANTIZERS.build(swinging), only=("prefixes",)).ok


def test_a_correct_layer_from_elsewhere_passes_without_traits() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(16, 4))

        def forward(self, z: torch.Tensor) -> Any:
            if not torch.isfinite(z).all() or z.numel() == 0 or z.shape[-1] != 4:
                raise ValueError("latents: NaN, inf, an empty batch or other channels")
            codes = torch.cdist(z.detach().double(), self.table.double()).argmin(-1)
            z_q = self.table[codes]
            return (z_q + (z - z.detach())).to(z.dtype), codes, (z - z_q).square().mean()

        def lookup(self, codes: torch.Tensor) -> torch.Tensor:
            if codes.dtype != torch.int64 or codes.min() < 0 or codes.max() >= 16:
                raise ValueError("codes")
            return self.table[codes]

    def quantize(layer: Any, z: torch.Tensor) -> Any:
        z_q, codes, loss = layer(z)
        return z_q, (codes,), loss

    def decode(layer: Any, codes: Any) -> torch.Tensor:
        if len(codes) != 1:
            raise ValueError("maps")
        return layer.lookup(codes[0])  # type: ignore[no-any-return]

    report = check(lambda: Adapter(Layer(), 4, (16,), quantize, decode))
    assert report.ok, report


def test_an_adapter_refuses_another_number_of_maps_than_its_layer_has() -> None:
    """By the recipe of the document: the layer is asked for the first map, and sees no other."""
    adapter = Adapter(torch.nn.Embedding(16, 4), 4, (16,), lambda layer, z: (z, (), z.sum()), lambda layer, codes: layer(codes[0]))
    code = torch.zeros(2, 3, dtype=torch.int64)
    assert adapter.decode((code,)).shape == (2, 4, 3)
    for codes in ((), (code, code)):
        with pytest.raises(ValueError, match=f"codes: {len(codes)} maps; it decodes 1"):
            adapter.decode(codes)
    stages = residual_with_dropout(dropout=True)
    assert stages.decode((code,)).shape == stages.decode((code, code)).shape
    with pytest.raises(ValueError, match="codes: 3 maps; it decodes 1, 2"):
        stages.decode((code, code, code))


class Lost(PlainVQ):
    """A batch of one has codes that would be compared by broadcasting."""

    def forward(self, z: Any, rng: Any = None, active: Any = None) -> Quantized:
        out = super().forward(z, rng, active)
        return Quantized(out.z, tuple(c.squeeze(0) for c in out.codes), out.loss)


def test_codes_are_compared_shape_by_shape() -> None:
    with pytest.raises(Violation, match=r"codes of 1 samples: shape \(1667,\); expected \(1, 1667\)"):
        CHECKS["neighbours"].run(Subject("lost", Lost, TRAITS, processes=False))


def test_latents_off_the_origin_are_judged_about_a_codebook_that_was_set_there() -> None:
    report = check(lambda: QUANTIZERS.build(GumbelConfig(codes=16, dim=4)), only=("nearest",))
    assert report.ok and not report.skipped, report
    placed = Subject("vq", lambda: VQ(SMALL), traits_of(VQ(SMALL)), processes=False).placed(300.0)
    assert not placed.training and (placed.codebook - 300).abs().max() < 5


@pytest.mark.parametrize("name", ["vq", "residual/lfq"])
def test_two_real_processes_agree_too(name: str) -> None:
    report = check(CONFIGS[name], processes=True, only=("two_ranks", "two_ranks_restart"))
    assert report.ok, report
    assert "real processes" in str(report)


def test_real_processes_tell_what_failed() -> None:
    report = check(lambda: Unreduced(SMALL), processes=True, only=("two_ranks",))
    assert report.failed == ("two_ranks",), report


class Raises(PlainVQ):
    """An error of its own in the middle of a step."""

    def update(self, rng: Any, comm: Any) -> dict[str, torch.Tensor]:
        raise KeyError("sums")


def test_an_error_of_the_class_is_an_outcome_and_what_stands_on_it_is_not_judged() -> None:
    report = check(Raises, traits=TRAITS)
    notes = {outcome.check: outcome.note for outcome in report.outcomes}
    assert notes["forward_is_pure"] == "KeyError: 'sums'" and "not judged: needs" in notes["two_ranks"]
    assert len(report.outcomes) == len(CHECKS)


class CannotBegin(PlainVQ):
    def initialize(self, z: torch.Tensor, rng: Any) -> None:
        raise KeyError("codebook")


def test_a_class_whose_initialize_fails_is_judged_so() -> None:
    report = check(CannotBegin, traits=TRAITS)
    assert len(report.outcomes) == len(CHECKS)
    assert "KeyError: 'codebook'" in {outcome.note for outcome in report.outcomes if outcome.status == "failed"}


def test_an_unknown_class_is_checked_for_what_the_interface_promises() -> None:
    report = check(PlainVQ)
    assert report.ok and {"loss_terms", "nearest", "moving_averages", "restart_raises_usage"} <= set(report.skipped), report
    assert check(PlainVQ(), traits=Traits()).ok, "an instance will do"


def test_only_some_checks_run_with_what_they_need() -> None:
    report = check(PlainVQ, traits=TRAITS, only=("nearest",))
    assert [outcome.check for outcome in report.outcomes] == ["shapes", "forward_is_pure", "round_trip", "neighbours", "nearest"]
    with pytest.raises(ValueError, match="'nearst' is none"):
        check(PlainVQ, only=("nearst",))


def test_the_command_line_checks_types_and_classes_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "fsq.yaml").write_text("levels: [5, 4]\n")
    main(["fsq", "--config", str(tmp_path / "fsq.yaml")])
    out = capsys.readouterr().out
    assert "K=20" in out and re.search(r"skipped moving_averages +moving averages of one table", out) and "0 failed" in out
    main(["stage1_tokenizer.quantizers.fsq:FSQ", "--levels", "[5, 4]"])
    assert "K=20" in capsys.readouterr().out
    with pytest.raises(UserError, match="FSQConfig: a configuration; name the class that is registered with it"):
        main(["stage1_tokenizer.quantizers.fsq:FSQConfig"])
    main(["tests.plain_vq:PlainVQ"])
    assert "PlainVQ()" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["tests.plain_faults:FlatCodes"])
    assert stop.value.code == 1 and re.search(r"failed +shapes +codes of name", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        ([], UserError, "usage: .*types: bsq, fsq"),
        (["tests.plain_vq:Missing"], UserError, "Missing"),
        (["tests.plain_vq:K"], UserError, "a int; expected what makes"),
        (["tests.plain_vq:PlainVQ", "--dim", "3"], UserError, "takes no fields"),
        (["fsqq"], ValueError, "did you mean 'fsq'"),
        (["fsq", "--levles", "[3]"], ConfigError, "did you mean 'levels'"),
    ],
)
def test_the_command_line_says_what_is_wrong(argv: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        main(argv)


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "usage: python -m stage1_tokenizer.quantizers.conformance TYPE" in capsys.readouterr().out


def test_the_document_shows_what_other_layers_do() -> None:
    """Check by check, for the version that the document names; figures may differ in their last digits."""
    pytest.importorskip("vector_quantize_pytorch")
    import importlib.util
    from importlib.metadata import version

    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^(\S.*) \(vector-quantize-pytorch [\d.]+\)\n((?:(?:passed|failed|skipped) .*\n)+)", text, re.MULTILINE))
    if f"(vector-quantize-pytorch {version('vector-quantize-pytorch')})" not in text:
        pytest.skip(f"the document is not of version {version('vector-quantize-pytorch')}")
    spec = importlib.util.spec_from_file_location("check_other_layers", ROOT / "examples/check_other_layers.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert shown.keys() == example.LAYERS.keys()
    for name, lines in shown.items():
        expected = [tuple(line.split()[:2]) for line in lines.splitlines()]
        assert [(o.status, o.check) for o in example.report(name).outcomes] == expected, name


def test_the_document_names_every_check_and_its_promise() -> None:
    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    missing = [name for name, entry in CHECKS.items() if f"| `{name}` | {entry.promise} |" not in text]
    assert not missing, missing


def test_the_document_lists_every_fault() -> None:
    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    rows = {f"| {str(cls.__doc__).splitlines()[0].rstrip('.')} | `{name}` |" for cls, name in FAULTS.items()}
    assert not {row for row in rows if row not in text}
