"""Container A's mathematics against theory: Eckart and Young, the data-aware optimum, the diagonal, sparse patterns, refits."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "attempts" / "container_a_required_flops"))  # as for a script that is run

import approximations as a
import sparsity
from data_aware_low_rank_plus_diag import by_optimizer
from matrix_approx_bench import break_even

problems = st.tuples(st.integers(0, 2**31), st.sampled_from([(8, 8), (16, 8), (8, 16), (24, 8), (8, 32)]), st.integers(1, 8))
few = settings(max_examples=25)


def problem(seed: int, shape: tuple[int, int], seen: int = 40):
    """A matrix (out, in) and second moments of inputs whose directions differ widely in size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = torch.randn(seen, shape[1], generator=generator, dtype=torch.float64)
    x = x @ torch.randn(shape[1], shape[1], generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, shape[1], dtype=torch.float64)
    return w, x, x.T @ x / seen


def perturbed(factors, seed: int, size: float = 0.1):
    generator = torch.Generator().manual_seed(seed)
    return [f + size * f.abs().mean() * torch.randn(f.shape, generator=generator, dtype=f.dtype) for f in factors]


# --- low rank ---------------------------------------------------------------------------------------------------------

@few
@given(problems)
def test_svd_has_the_error_of_eckart_and_young_and_no_neighbour_is_better(given):
    seed, shape, rank = given
    w, _, _ = problem(seed, shape)
    left, right = a.svd_factors(w, rank)
    assert left.shape == (shape[0], rank) and right.shape == (rank, shape[1])
    error = a.weight_error(w, left @ right)
    assert error == pytest.approx(a.svd_error(torch.linalg.svdvals(w), rank), abs=1e-9)
    other = perturbed((left, right), seed)
    assert a.weight_error(w, other[0] @ other[1]) >= error


@few
@given(problems)
def test_the_data_aware_optimum_has_its_closed_form_error_and_is_never_worse_than_svd(given):
    seed, shape, rank = given
    w, x, moments = problem(seed, shape)
    left, right = a.data_aware_factors(w, moments, rank)
    error = a.output_error(w, left @ right, moments)
    assert error == pytest.approx(((x @ (w - left @ right).T).norm() / (x @ w.T).norm()).item(), abs=1e-9)
    assert error == pytest.approx(a.data_aware_errors(w, moments)[rank].item(), abs=1e-7)
    plain = a.svd_factors(w, rank)
    assert error <= a.output_error(w, plain[0] @ plain[1], moments) + 1e-9
    assert a.weight_error(w, left @ right) >= a.weight_error(w, plain[0] @ plain[1]) - 1e-9, "each is best in its own norm"
    other = perturbed((left, right), seed)
    assert a.output_error(w, other[0] @ other[1], moments) >= error - 1e-9


@pytest.mark.parametrize("seed", [0, 1])
def test_an_optimizer_finds_the_closed_form_and_nothing_better(seed):
    w, _, moments = problem(seed, (16, 12))
    best = a.data_aware_errors(w, moments)[3].item()
    found = by_optimizer(w, moments, 3, steps=500, seed=seed)
    assert best * (1 - 1e-9) <= found <= best * 1.02


def test_few_inputs_are_reproduced_exactly():
    """With 5 inputs the outputs have rank 5, whatever W is: the covariance is singular, and the closed form stays exact."""
    w, x, moments = problem(3, (16, 12), seen=5)
    left, right = a.data_aware_factors(w, moments, 5)
    assert a.output_error(w, left @ right, moments) < 1e-6 < 0.1 < a.weight_error(w, left @ right)


def test_white_inputs_make_both_the_same():
    w, _, _ = problem(4, (16, 12))
    for rank in (1, 5, 11):
        ours, plain = a.data_aware_factors(w, torch.eye(12), rank), a.svd_factors(w, rank)
        torch.testing.assert_close(ours[0] @ ours[1], plain[0] @ plain[1])


# --- the diagonal -----------------------------------------------------------------------------------------------------

@few
@given(problems)
def test_a_diagonal_never_increases_the_error(given):
    seed, shape, rank = given
    w, _, moments = problem(seed, shape)
    alone = a.data_aware_errors(w, moments)[rank].item()
    errors = []
    for rounds in (1, 3):
        left, right, d = a.low_rank_plus_diagonal(w, moments, rank, rounds)
        errors.append(a.output_error(w, left @ right + a.diagonal_matrix(d, *shape), moments))
    assert errors[1] <= errors[0] + 1e-7 and errors[0] <= alone + 1e-7


@few
@given(problems)
def test_the_gradient_at_the_best_diagonal_is_zero(given):
    """The gradient of the error in every entry of d is zero."""
    seed, shape, _ = given
    w, _, moments = problem(seed, shape)
    d = a.best_diagonal(w, moments).requires_grad_()
    rest = w - a.diagonal_matrix(d, *shape)
    ((rest @ moments) * rest).sum().backward()
    assert d.grad.abs().max() < 1e-6 * (w @ moments).abs().max()


def test_a_matrix_that_is_low_rank_plus_diagonal_is_found():
    w, _, moments = problem(5, (12, 12))
    hidden = torch.linspace(5, 9, 12, dtype=torch.float64).diag() + a.svd_factors(w, 1)[0] @ a.svd_factors(w, 1)[1]
    left, right, d = a.low_rank_plus_diagonal(hidden, moments, 1, rounds=60)
    assert a.output_error(hidden, left @ right + d.diag(), moments) < 0.05 < 0.3 < a.data_aware_errors(hidden, moments)[1]


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_the_layer_multiplies_with_the_fitted_factors(shape):
    w, x, moments = problem(6, shape)
    left, right, d = a.low_rank_plus_diagonal(w, moments, 3, rounds=2)
    for parts, whole in (((left, right), left @ right), ((left, right, d), left @ right + a.diagonal_matrix(d, *shape))):
        torch.testing.assert_close(a.LowRank(*parts)(x.float()), (x @ whole.T).float(), rtol=1e-4, atol=1e-4)


# --- sparse patterns --------------------------------------------------------------------------------------------------

@few
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6))
def test_two_of_four_keeps_the_two_largest(seed, rows, fours):
    x = torch.randn(rows, 4 * fours, generator=torch.Generator().manual_seed(seed))
    kept = sparsity.two_of_four(x).view(rows, fours, 4)
    assert torch.equal((kept != 0).sum(-1), torch.full((rows, fours), 2))
    smallest_kept = torch.where(kept != 0, kept.abs(), torch.inf).amin(-1)
    largest_lost = torch.where(kept == 0, x.view(rows, fours, 4).abs(), 0).amax(-1)
    assert (smallest_kept >= largest_lost).all()


def test_two_of_four_of_equal_values_keeps_two():
    assert sparsity.mask_two_of_four(torch.zeros(2, 8)).sum() == 8


def test_blocks_of_weights():
    w = torch.ones(8, 12)
    w[:4, 4:8], w[4:, :4] = 5.0, 3.0
    mask = sparsity.mask_blocks(w, 2 / 6, 4)
    assert torch.equal(mask, w > 1)


def test_the_top_neurons_and_groups():
    scores = torch.tensor([5.0, 0, 4, 4, 0, 6])
    assert sparsity.top_indices(scores, 0.5).tolist() == [0, 2, 5] or sparsity.top_indices(scores, 0.5).tolist() == [0, 3, 5]
    assert sparsity.top_indices(scores, 0.34, group=2).tolist() == [2, 3]


@few
@given(problems, st.integers(0, 2**31))
def test_a_refit_is_the_least_squares_solution(given, choice):
    seed, (width, hidden), _ = given
    w2, h, moments = problem(seed, (width, hidden), seen=60)
    kept = torch.randperm(hidden, generator=torch.Generator().manual_seed(choice))[:hidden // 2].sort().values
    new = sparsity.refit(w2, moments, kept)
    expected = torch.linalg.lstsq(h[:, kept], h @ w2.T).solution.T
    error, least, before = ((h[:, kept] @ m.T - h @ w2.T).norm() for m in (new, expected, w2[:, kept]))
    assert error <= before + 1e-9 and error == pytest.approx(least.item(), rel=1e-3, abs=1e-9)


def test_a_masked_layer_stays_masked_in_training():
    mask = torch.tensor([[True, False, True, False]])
    layer = sparsity.Sparse(torch.ones(1, 4), mask)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert layer.kept == 2 and torch.equal(layer.dense_weight() != 0, mask)


# --- break-even -------------------------------------------------------------------------------------------------------

def test_break_even():
    assert break_even([8, 16, 32], [3.0, 2.0, 1.5]) is None
    assert break_even([8, 16], [0.9, 0.5]) == 0
    assert break_even([8, 16, 32], [3.0, 1.5, 0.5]) == pytest.approx(24)
