"""The basis of a sketch against its definition: of all maps to a few numbers, the least error where that matters."""

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


def seen(keys, queries):
    """C_q^(1/4) (k - mean) [N, n, D], and C_q^(1/4) [N, D, D]: float64, with C_q's least eigenvalues raised as said."""
    values, vectors = np.linalg.eigh((queries.mT @ queries).double().numpy())
    values = np.maximum(values, values[:, -1:] * 1e-6)
    root = torch.from_numpy((vectors * values[:, None] ** 0.25) @ vectors.transpose(0, 2, 1))
    return (keys - keys.mean(dim=1, keepdim=True)).double() @ root, root


def error(y, root, to, back):
    """Sum over keys of |y|^4 |y - estimate of y|^2, [N], for maps ``to`` and ``back`` [N, D, rank]."""
    estimated = y @ root.inverse() @ to.double() @ back.double().mT @ root
    return (y.pow(2).sum(2) ** 2 * (y - estimated).pow(2).sum(2)).sum(1)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 40), dim=st.integers(1, 12), seed=st.integers(0, 99), data=st.data())
def test_the_error_is_that_of_the_directions_left_out(n, dim, seed, data):
    """By the singular values of the weighted keys: no map of this rank has a smaller error (Eckart-Young)."""
    rank = data.draw(st.integers(1, dim))
    keys, queries = draw(n, dim, seed)
    mean, to, back = fit_basis(keys, queries.mT @ queries, rank)
    assert (mean.shape, to.shape, back.shape) == ((2, dim), (2, dim, rank), (2, dim, rank))
    torch.testing.assert_close(mean, keys.mean(dim=1))
    y, root = seen(keys, queries)
    weighted = (y * y.pow(2).sum(2, keepdim=True)).numpy()
    for head in range(2):
        singular = np.linalg.svd(weighted[head], compute_uv=False)
        least, scale = (singular[rank:] ** 2).sum(), (singular**2).sum()
        assert error(y, root, to, back)[head] == pytest.approx(least, rel=1e-3, abs=1e-5 * scale + 1e-9)


def test_far_keys_count_more_than_many_near_ones():
    """A hundred keys that differ in one direction, and four far ones in another: the one direction kept is theirs."""
    keys = torch.zeros(1, 104, 6)
    keys[0, :100, 0] = torch.linspace(-2, 2, 100)
    keys[0, 100:, 3] = torch.tensor([4.0, -4.0, 4.0, -4.0])
    _, to, _ = fit_basis(keys, torch.eye(6)[None], 1)
    assert keys[0, :, 0].var() > 2 * keys[0, :, 3].var()  # what plain principal directions would keep
    torch.testing.assert_close(to[0, :, 0], torch.eye(6)[3], atol=1e-6, rtol=0)


def test_directions_that_queries_use_count_more():
    """Keys alike in all directions: kept are those that queries use most."""
    keys = torch.randn(1, 4000, 6, generator=torch.Generator().manual_seed(1))
    _, to, _ = fit_basis(keys, torch.diag(torch.tensor([1.0, 1.0, 50.0, 1.0, 80.0, 1.0]))[None], 2)
    kept = to[0].pow(2).sum(dim=1)
    assert sorted(kept.topk(2).indices.tolist()) == [2, 4]
    assert kept[[0, 1, 3, 5]].max() < 0.05 * kept[[2, 4]].min()


def test_with_queries_alike_in_all_directions_it_is_orthonormal():
    keys, _ = draw()
    _, to, back = fit_basis(keys, 7 * torch.eye(8).expand(2, 8, 8), 5)
    torch.testing.assert_close(to, back, atol=1e-5, rtol=0)
    for head in range(2):
        x = (keys[head] - keys[head].mean(dim=0)).double().numpy()
        _, vectors = np.linalg.eigh(np.einsum("n,nd,ne->de", (x**2).sum(1) ** 2, x, x))
        similarity = np.abs(vectors[:, ::-1][:, :5].T @ to[head].double().numpy())
        np.testing.assert_allclose(similarity, np.eye(5), atol=1e-4)
        assert (to[head].numpy()[np.abs(to[head].numpy()).argmax(axis=0), np.arange(5)] > 0).all()


def test_all_directions_lose_nothing():
    keys, queries = draw()
    mean, to, back = fit_basis(keys, queries.mT @ queries, 8)
    expected = queries @ (keys - mean[:, None]).mT
    torch.testing.assert_close(queries @ back @ ((keys - mean[:, None]) @ to).mT, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("scaled", ["queries", "keys"])
def test_scale_does_not_matter(scaled):
    keys, queries = draw()
    plain = fit_basis(keys, queries.mT @ queries, 4)
    outer = queries.mT @ queries * (1e8 if scaled == "queries" else 1)
    mean, *maps = fit_basis(keys * (1e4 if scaled == "keys" else 1), outer, 4)
    torch.testing.assert_close(mean / (1e4 if scaled == "keys" else 1), plain[0])
    for a, b in zip(plain[1:], maps, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_one_huge_key_takes_one_direction():
    """The others are as they would be among the keys left, or nearly: float64 holds both."""
    keys, queries = draw(n=400)
    keys[:, 7] = 1e3 * torch.eye(8)[2]
    _, to, _ = fit_basis(keys, queries.mT @ queries, 4)
    rest = torch.cat([keys[:, :7], keys[:, 8:]], dim=1)
    y, root = seen(rest, queries)
    spread = (y @ root.inverse() @ to.double()).pow(2).mean(dim=1)
    assert (spread[:, 1:] > 0.01 * spread.amax(dim=1, keepdim=True)).all()
    assert to.isfinite().all()


@pytest.mark.parametrize("queries", ["none", "one direction"])
def test_few_queries_give_a_finite_basis(queries):
    keys, q = draw()
    outer = torch.zeros(2, 8, 8) if queries == "none" else q[:, :1].mT @ q[:, :1]
    _, to, back = fit_basis(keys, outer, 4)
    assert to.isfinite().all()
    assert back.isfinite().all()


def test_keys_that_are_all_alike_give_a_finite_basis():
    _, q = draw()
    _, to, back = fit_basis(torch.ones(2, 40, 8), q.mT @ q, 4)
    assert to.isfinite().all()
    assert back.isfinite().all()


def test_it_is_the_same_on_every_run():
    keys, queries = draw()
    outer = queries.mT @ queries
    assert all(torch.equal(a, b) for a, b in zip(fit_basis(keys, outer, 5), fit_basis(keys, outer, 5), strict=True))
