"""The random matrices have the properties their docstrings state."""

import pytest
import torch

from risotto_zoo.initializers import (
    delta_kernel_,
    looks_linear,
    semi_orthogonal,
    signed_permutation,
    signed_selection,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (12, 5), (5, 12), (1, 7), (7, 1)])
def test_semi_orthogonal(rows, cols):
    u = semi_orthogonal(rows, cols, rng())
    gram = u.T @ u if rows >= cols else u @ u.T
    assert u.shape == (rows, cols) and u.dtype == torch.float64
    torch.testing.assert_close(gram, torch.eye(min(rows, cols), dtype=torch.float64), atol=1e-14, rtol=0)


def test_semi_orthogonal_takes_an_exact_zero(monkeypatch):
    """float32 Gaussians are exactly 0 once in some ten millions."""
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: draw(*args, **kwargs).fill_diagonal_(0))
    u = semi_orthogonal(5, 5, rng())
    torch.testing.assert_close(u.T @ u, torch.eye(5, dtype=torch.float64), atol=1e-14, rtol=0)


def test_semi_orthogonal_is_haar():
    """Every entry of a Haar matrix is symmetric with variance 1/n; without the sign fix the diagonal is biased."""
    entries = torch.stack([semi_orthogonal(4, 4, rng(seed)) for seed in range(1500)])
    assert entries.mean(0).abs().max() < 5 * 0.5 / 1500**0.5
    torch.testing.assert_close(entries.var(0), torch.full((4, 4), 0.25, dtype=torch.float64), atol=0.05, rtol=0)


def test_semi_orthogonal_takes_reflections_as_often_as_rotations():
    signs = torch.stack([torch.det(semi_orthogonal(3, 3, rng(seed))) for seed in range(1000)])
    assert signs.mean().abs() < 5 / 1000**0.5


def test_signed_permutation_has_one_entry_a_row_and_column_and_both_signs():
    p = signed_permutation(64, rng())
    assert torch.equal(p.abs().sum(0), torch.ones(64)) and torch.equal(p.abs().sum(1), torch.ones(64))
    assert set(p.unique().tolist()) == {-1.0, 0.0, 1.0}


def test_signed_selection_takes_distinct_columns():
    p = signed_selection(5, 20, rng())
    assert torch.equal(p.abs().sum(1), torch.ones(5)) and p.abs().sum(0).max() == 1


def test_looks_linear_transports_the_signal_through_a_relu():
    u, z = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 10, dtype=torch.float64)
    paired = torch.cat([z, -z]).relu()
    plus, minus = (looks_linear(u) @ paired).relu().chunk(2)
    torch.testing.assert_close(plus - minus, u @ z)
    assert (plus * minus == 0).all()


def test_delta_kernel_is_its_matrix_at_every_pixel():
    conv = torch.nn.Conv2d(4, 6, 3, padding=1).double()
    matrix, image = torch.randn(6, 4, dtype=torch.float64), torch.randn(1, 4, 5, 5, dtype=torch.float64)
    delta_kernel_(conv, matrix)
    torch.testing.assert_close(conv(image), torch.einsum("oi,bihw->bohw", matrix, image))


def test_same_seed_same_matrix():
    assert torch.equal(semi_orthogonal(9, 4, rng(3)), semi_orthogonal(9, 4, rng(3)))
    assert not torch.equal(semi_orthogonal(9, 4, rng(3)), semi_orthogonal(9, 4, rng(4)))
