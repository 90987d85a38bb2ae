"""The basis of a sketch against its definition: of all maps to a few numbers, it estimates q.k with the least error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.kernels.basis import fit_basis


def draw(n=200, dim=8, seed=0, heads=2):
    """Keys [N, n, D] with an offset, queries [N, 50, D]; dimensions of unlike size in both."""
    generator = torch.Generator().manual_seed(seed)
    keys = 3 + torch.randn(heads, n, dim, generator=generator) * torch.arange(1, dim + 1)
    queries = torch.randn(heads, 50, dim, generator=generator) * torch.arange(dim, 0, -1) ** 1.5
    return keys, queries


def error(keys, queries, to, back):
    """Mean squared error of q.(k - mean), [N]."""
    x = (keys - keys.mean(dim=1, keepdim=True)).double()
    estimated = queries.double() @ back.double() @ (x @ to.double()).mT
    return (queries.double() @ x.mT - estimated).pow(2).mean(dim=(1, 2))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), dim=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_the_error_is_that_of_the_directions_left_out(n, dim, seed, data):
    """By the singular values of Q X^T: no map of this rank has a smaller error (Eckart-Young)."""
    rank = data.draw(st.integers(1, dim))
    keys, queries = draw(n, dim, seed)
    mean, to, back = fit_basis(keys, queries.mT @ queries, rank)
    assert (mean.shape, to.shape, back.shape) == ((2, dim), (2, dim, rank), (2, dim, rank))
    torch.testing.assert_close(mean, keys.mean(dim=1))
    x = (keys - mean[:, None]).double()
    product = (queries.double() @ x.mT).numpy()
    for head in range(2):
        singular = np.linalg.svd(product[head], compute_uv=False)
        least = (singular[rank:] ** 2).sum() / product[head].size
        scale = (singular**2).sum() / product[head].size
        assert error(keys, queries, to, back)[head] == pytest.approx(least, abs=1e-5 * scale + 1e-9)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_it_beats_the_principal_directions_of_the_keys(rank):
    keys, queries = draw()
    eye = torch.eye(8).expand(2, 8, 8)
    _, *of_keys = fit_basis(keys, eye, rank)
    _, *weighted = fit_basis(keys, queries.mT @ queries, rank)
    assert (error(keys, queries, *weighted) < 0.95 * error(keys, queries, *of_keys)).all()


def test_with_queries_alike_in_all_directions_it_is_the_principal_directions_of_the_keys():
    keys, _ = draw()
    _, to, back = fit_basis(keys, 7 * torch.eye(8).expand(2, 8, 8), 5)
    torch.testing.assert_close(to, back, atol=1e-5, rtol=0)
    for head in range(2):
        _, vectors = np.linalg.eigh(np.cov(keys[head].double().numpy(), rowvar=False, bias=True))
        similarity = np.abs(vectors[:, ::-1][:, :5].T @ to[head].double().numpy())
        np.testing.assert_allclose(similarity, np.eye(5), atol=1e-4)
        assert (to[head].numpy()[np.abs(to[head].numpy()).argmax(axis=0), np.arange(5)] > 0).all()


def test_all_directions_lose_nothing():
    keys, queries = draw()
    mean, to, back = fit_basis(keys, queries.mT @ queries, 8)
    expected = queries @ (keys - mean[:, None]).mT
    torch.testing.assert_close(queries @ back @ ((keys - mean[:, None]) @ to).mT, expected, atol=1e-3, rtol=1e-4)


def test_the_scale_of_the_queries_does_not_matter():
    keys, queries = draw()
    plain = fit_basis(keys, queries.mT @ queries, 4)
    scaled = fit_basis(keys, 1e8 * queries.mT @ queries, 4)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("queries", ["none", "one direction"])
def test_few_queries_give_a_finite_basis(queries):
    keys, q = draw()
    outer = torch.zeros(2, 8, 8) if queries == "none" else q[:, :1].mT @ q[:, :1]
    _, to, back = fit_basis(keys, outer, 4)
    assert to.isfinite().all()
    assert back.isfinite().all()
    if queries == "one direction":
        signal = (q[:, :1] @ (keys - keys.mean(1, keepdim=True)).mT).pow(2).mean()
        assert (error(keys, q[:, :1], to, back) < 1e-3 * signal).all()


def test_it_is_the_same_on_every_run():
    keys, queries = draw()
    outer = queries.mT @ queries
    assert all(torch.equal(a, b) for a, b in zip(fit_basis(keys, outer, 5), fit_basis(keys, outer, 5), strict=True))
