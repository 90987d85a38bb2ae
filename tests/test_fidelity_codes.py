"""bench.fidelity: bases lose nothing, quantisers store what they say."""

import itertools

import pytest
import torch
from fidelity_cases import C, D, M, N, draw, one_thread  # noqa: F401

from bench.fidelity import quantisers
from bench.fidelity.bases import fit_basis
from bench.fidelity.quantisers import ChunkScale, Levels, Product, Truncated

# -- bases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["none", "random", "keys", "queries", "spread", "far"])
@pytest.mark.parametrize("centred", [True, False])
def test_a_basis_loses_nothing(kind, centred):
    fit, keys, q, outer = draw()
    basis = fit_basis(kind, fit, outer, centred=centred)
    z = basis.coordinates(keys)
    direct = q @ keys.flatten(1, 2).mT
    through = basis.project(q) @ z.flatten(1, 2).mT + q @ basis.mean[..., None]
    torch.testing.assert_close(through, direct, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(basis.variance, basis.coordinates(fit).pow(2).mean(dim=1), rtol=1e-4, atol=1e-4)
    assert bool(basis.mean.any()) == centred


def test_the_queries_basis_has_the_least_error_of_scores():
    """Over the very queries and keys that it was fitted to, no basis of the same rank estimates q.k better."""
    fit, _, q, outer = draw()
    error = {}
    for kind in ("keys", "random", "queries"):
        basis = fit_basis(kind, fit, outer)
        z = basis.coordinates(fit)
        lost = basis.project(q)[..., 4:] @ z[..., 4:].mT
        error[kind] = lost.pow(2).mean().item()
        if kind == "queries":
            assert error[kind] == pytest.approx(basis.variance[:, 4:].sum(dim=1).mean().item(), rel=1e-3)
    assert error["queries"] < 0.5 * min(error["keys"], error["random"])


# -- quantisers --------------------------------------------------------------------------------------------------------


def test_gaussian_levels_are_the_known_ones():
    torch.testing.assert_close(quantisers.gaussian_levels(1), torch.tensor([-0.7979, 0.7979]), atol=1e-3, rtol=0)
    torch.testing.assert_close(quantisers.gaussian_levels(2)[2:], torch.tensor([0.4528, 1.5104]), atol=1e-3, rtol=0)
    known = [1.0, 0.3634, 0.1175, 0.03454, 0.009497]  # Max 1960
    assert [quantisers.gaussian_distortion(b) for b in range(5)] == pytest.approx(known, rel=2e-3)


@pytest.mark.parametrize("total", [3, 5, 7])
def test_bits_are_spread_as_the_best_of_all_ways(total):
    variance = torch.tensor([9.0, 2.5, 0.6, 0.01])
    found = quantisers.spread_bits(variance, total)

    def error(bits):
        return sum(v * quantisers.gaussian_distortion(b) for v, b in zip(variance.tolist(), bits, strict=True))

    ways = [bits for bits in itertools.product(range(total + 1), repeat=4) if sum(bits) == total]
    assert sum(found.tolist()) == total
    assert error(found.tolist()) == pytest.approx(min(error(bits) for bits in ways))


def test_groups_share_the_information_evenly():
    variance = torch.logspace(4, -12, 32, base=2.0)
    groups = quantisers.share_out(variance, 4, 8)
    used = sorted(itertools.chain(*groups))
    assert used == list(range(len(used)))
    assert 4 < len(used) < 32
    level = variance.log2()[: len(used)].mean().item() / 2 - 32 / len(used)
    loads = [sum(variance[c].log2().item() / 2 - level for c in columns) for columns in groups]
    assert sum(loads) == pytest.approx(32, rel=1e-4)
    assert max(loads) - min(loads) < 3
    assert [len(columns) for columns in quantisers.share_out(torch.ones(12), 4, 8)] == [3] * 4


def test_nearest_and_kmeans():
    g = torch.Generator().manual_seed(1)
    true = torch.randn(5, 3, generator=g) * 10
    x = true.repeat(40, 1) + 0.01 * torch.randn(200, 3, generator=g)
    brute = [min(range(5), key=lambda c: float((row - true[c]).pow(2).sum())) for row in x]
    assert quantisers.nearest(x, true).tolist() == brute
    one, ten = (
        min((x - c[quantisers.nearest(x, c)]).pow(2).sum().item() for c in [quantisers.kmeans(x, 8, rounds)])
        for rounds in (0, 10)
    )
    assert ten < one
    centres = quantisers.kmeans(x, 8, 10)
    own = quantisers.nearest(x, centres)
    for c in own.unique():
        torch.testing.assert_close(centres[c], x[own == c].mean(dim=0), rtol=1e-3, atol=2e-2)


def fitted(quantiser):
    """A quantiser after its fit, coordinates of chunks, and what it makes of them."""
    fit, keys, _, outer = draw()
    basis = fit_basis("queries", fit, outer)
    quantiser.fit(basis.coordinates(fit), basis.variance)
    z = basis.coordinates(keys)
    return z, quantiser.round_trip(z)


def distinct(x):
    return len({tuple(row) for row in x.reshape(-1, x.shape[-1]).tolist()})


@pytest.mark.parametrize("quantiser", [ChunkScale(6, 3), ChunkScale(6, 2, 8)], ids=lambda q: q.name)
def test_chunk_scale_stores_no_more_than_it_says(quantiser):
    z, out = fitted(quantiser)
    assert not out[..., 6:].any()
    for head, chunk, column in itertools.product(range(N), range(M), range(6)):
        assert distinct(out[head, chunk, :, column, None]) <= 2**quantiser.bits - 1
    half = z[..., :6].abs().amax(2, keepdim=True) / ((1 << (quantiser.bits - 1)) - 1) / 2
    assert ((out - z)[..., :6].abs() <= half * 1.1).all()
    bits = 6 * (quantiser.bits + quantiser.scale_bits / C)
    assert quantiser.token_bits(C, D) == pytest.approx(bits)


@pytest.mark.parametrize("levels", [Levels(24), Levels((5, 3, 3, 2, 1))], ids=lambda q: q.name)
def test_levels_store_no_more_than_they_say(levels):
    z, out = fitted(levels)
    for head in range(N):
        bits = levels.bits[head].tolist()
        assert sum(bits) == levels.token_bits(C, D) == levels.total
        for column, b in enumerate(bits):
            assert distinct(out[head, ..., column, None]) <= 2**b
            if b >= 3:
                spread = z[head, ..., column].var()
                assert (out - z)[head, ..., column].pow(2).mean() < 2.5 * quantisers.gaussian_distortion(b) * spread


@pytest.mark.parametrize("product", [Product(3, 3), Product(2, 4), Product(2, 3, coarse=2)], ids=lambda q: q.name)
def test_product_stores_no_more_than_it_says(product):
    z, out = fitted(product)
    assert product.token_bits(C, D) == product.groups * product.bits + product.coarse
    for head in range(N):
        centres, turned, books = product._heads[head]
        assert len(books) == product.groups
        assert len(centres) == (1 << product.coarse if product.coarse else 0)
        assert all(len(book) == 1 << product.bits for _, book in books)
        rows, made = z[head].flatten(0, 1), out[head].flatten(0, 1)
        for row, got in zip(rows, made, strict=True):  # the nearest entry, group by group
            base = min(centres, key=lambda c: (row - c).pow(2).sum().item()) if product.coarse else torch.zeros(D)
            rest = (row - base) @ turned if product.coarse else row
            expected = torch.zeros(D)
            for columns, book in books:
                expected[columns] = min(book, key=lambda b: (rest[columns] - b).pow(2).sum().item())
            torch.testing.assert_close(got, base + (expected @ turned.T if product.coarse else expected))


def test_more_bits_give_smaller_errors():
    for small, large in (
        (Levels(16), Levels(40)),
        (Product(2, 4), Product(4, 6)),
        (ChunkScale(4, 4), ChunkScale(12, 4)),
        (Truncated(2), Truncated(8)),
        (Product(3, 4), Product(3, 4, coarse=4)),
    ):
        error = [(out - z).pow(2).sum() for z, out in (fitted(small), fitted(large))]
        assert error[1] < error[0], (small.name, large.name)
