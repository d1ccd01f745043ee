"""The likelihood is real: on grids small enough to enumerate, probabilities sum to 1 and samples follow them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor

from intarsia.specs import Cond
from stage2_prior.priors.autoregressive import AutoregressivePrior
from stage2_prior.priors.base import Prior
from stage2_prior.sampling import DrawOptions, filtered, guide
from tests.tiny_priors import Case, all_grids

CASES = [
    Case("gpt", ((3, (2, 2)),)),
    Case("gpt", ((3, (2, 2)),), classes=2),
    Case("gpt", ((3, (2, 2)),), classes=2, config={"positions": "rotary", "heads": 2}),
    Case("gpt", ((2, (1, 1)), (3, (2, 2)))),
    Case("gpt", ((2, (1, 2)), (3, (1, 2)), (2, (1, 2))), classes=2, config={"order": "position"}),
    Case("gpt", ((2, (1, 1)), (3, (2, 2))), levels="1:2", classes=2),
    Case("gpt", ((3, (4,)),), classes=2),
    Case("gpt", ((3, (1, 2, 2)),)),
    Case("gpt", ((3, (4,)),), classes=2, config={"positions": "rotary", "label": "prefix", "trunk": "llama"}),
    Case("gpt", (((2, 3), (1, 3)),), classes=2, config={"head": "factorised"}),
    Case("rq", ((2, (1, 2)), (3, (1, 2)), (2, (1, 2))), classes=2),
    Case("rq", ((2, (2,)), ((2, 2), (2,)), ((3, 2), (2,))), levels="1:3", config={"head": "factorised"}),
    Case("pixelcnn", ((3, (2, 2)),)),
    Case("pixelcnn", ((3, (2, 2)),), classes=2),
    Case("pixelcnn", ((2, (1, 1)), (3, (2, 2))), levels="1:2", classes=2),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def conditions(case: Case, prior: Prior) -> list[tuple[list[Tensor], int | None]]:
    """Every combination of upper codes (one row) and label, the null included."""
    uppers = all_grids(prior.upper) if prior.upper else []
    rows = len(uppers[0]) if uppers else 1
    labels = [*range(case.classes), None]
    return [([u[i : i + 1] for u in uppers], label) for i in range(rows) for label in labels]


def likelihood(prior: Prior, upper: Sequence[Tensor], label: int | None) -> tuple[list[Tensor], Tensor]:
    """All grids and their probabilities under one condition."""
    own = all_grids(prior.own)
    n = len(own[0])
    cond = None if label is None else Cond(label=torch.full((n,), label))
    nll = prior.nll([*(u.expand(n, *u.shape[1:]) for u in upper), *own], cond)
    return own, (-nll.double().sum(1)).exp()


@every_case
def test_the_probabilities_of_all_grids_sum_to_1(case: Case) -> None:
    prior = case.build()
    for upper, label in conditions(case, prior):
        _, p = likelihood(prior, upper, label)
        assert abs(p.sum().item() - 1) < 1e-5
        assert p.max() > 3 * p.mean()  # far from uniform, so that the sum says something


def drawn_from(prior: AutoregressivePrior, upper: Sequence[Tensor], label: int | None, options: DrawOptions) -> tuple[list[Tensor], Tensor]:
    """All grids and the probability that sampling with ``options`` gives each: the chain rule over the filtered steps."""
    own = all_grids(prior.own)
    n = len(own[0])
    codes = [*(u.expand(n, *u.shape[1:]) for u in upper), *own]
    logits = prior.logits(codes, None if label is None else Cond(label=torch.full((n,), label)))
    if options.guided:
        logits = [guide(a, b, options.guidance_at(0)) for a, b in zip(logits, prior.logits(codes), strict=True)]
    total = torch.zeros(n, dtype=torch.float64)
    for scores, grid, sizes in zip(logits, own, prior.digits, strict=True):
        weight = 1
        for part, size in zip(scores.double().split(sizes, 2), sizes, strict=True):  # a code is one digit, or several, the lowest first
            log_p = filtered(part.flatten(0, 1), options).log_softmax(-1).view(part.shape)
            digit = grid.flatten(1) // weight % size
            total += log_p.gather(2, digit[:, :, None])[..., 0].sum(1)
            weight *= size
    return own, total.exp().detach()


@every_case
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "top_k": 2}, {"top_p": 0.95, "guidance": 1.5}], ids=["plain", "filtered", "guided"]
)
def test_samples_follow_the_likelihood(case: Case, options: dict) -> None:
    prior = case.build()
    assert isinstance(prior, AutoregressivePrior)
    label = case.classes - 1 if case.classes else None
    if label is None:
        options = {k: v for k, v in options.items() if k != "guidance"}
    upper = conditions(case, prior)[0][0]
    own, p = drawn_from(prior, upper, label, DrawOptions(**options))
    assert abs(p.sum().item() - 1) < 1e-5
    n = 6000
    cond = None if label is None else Cond(label=torch.full((n,), label))
    drawn = prior.sample(
        torch.arange(n), upper=[u.expand(n, *u.shape[1:]) for u in upper], cond=cond, seed=11, micro_batch=1000, **options
    )
    index = {tuple(row): i for i, row in enumerate(torch.cat([g.flatten(1) for g in own], 1).tolist())}
    counts = torch.zeros(len(p), dtype=torch.float64)
    for row in torch.cat([g.flatten(1) for g in drawn], 1).tolist():
        counts[index[tuple(row)]] += 1
    assert (counts[p == 0] == 0).all()
    expected = p * n
    rare = expected < 5  # grids too rare for the test are pooled
    observed_bins = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected_bins = torch.cat([expected[~rare], expected[rare].sum()[None]])
    live = expected_bins > 0
    assert live.sum() > 3
    result = stats.chisquare(observed_bins[live].numpy(), expected_bins[live].numpy(), sum_check=False)
    assert result.pvalue > 1e-3, f"p = {result.pvalue}"


def test_without_options_samples_are_drawn_from_exp_minus_nll() -> None:
    """Ties ``drawn_from`` above to ``nll``."""
    for case in CASES:
        prior = case.build()
        assert isinstance(prior, AutoregressivePrior)
        for upper, label in conditions(case, prior)[:2]:
            torch.testing.assert_close(
                drawn_from(prior, upper, label, DrawOptions())[1], likelihood(prior, upper, label)[1], atol=1e-6, rtol=1e-4
            )
