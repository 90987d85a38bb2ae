"""bench.fidelity: variants against direct computations, and against the summaries that ship."""

import math

import pytest
import torch
from fidelity_cases import C, D, M, N, draw, one_thread  # noqa: F401

from bench.fidelity import catalogue
from bench.fidelity.bases import fit_basis
from bench.fidelity.quantisers import ChunkScale, Levels, Product
from bench.fidelity.variants import Coded, Refitted, Shipped, SubMeans, WithOutlier
from kvtier.kernels.select import exact_scores
from kvtier.runtime.summary import make_summary


def test_chunk_scale_is_the_shipped_sketch():
    """In the basis that ships, up to the sign of directions: the scores of ``[summary] kind = "sketch"``."""
    fit, keys, q, outer = draw()
    outer = outer / torch.linalg.eigvalsh(outer)[:, -1:, None]  # the sketch does so: scales round alike
    ours, ship = Coded("far", ChunkScale(8, 4)), Shipped("sketch", dtype=torch.float32, rank=8, bits=4)
    for variant in (ours, ship):
        variant.fit(fit, outer)
        variant.encode(keys)
    torch.testing.assert_close(ours.scores(q, M), ship.scores(q, M), rtol=1e-3, atol=1e-2)
    assert ours.token_bytes(C, D) == ship.token_bytes(C, D) == 4 + 2 * 8 / C


@pytest.mark.parametrize("name", [v.name for make in catalogue.SETS.values() for v in make()])
def test_every_variant_scores_a_prefix_the_same(name):
    """What a chunk scores does not depend on the chunks after it; bytes are positive and finite."""
    variant = next(v for make in catalogue.SETS.values() for v in make() if v.name == name)
    fit, keys, q, outer = draw_wide()
    variant.fit(fit, outer)
    variant.encode(keys)
    whole = variant.scores(q, 5)
    assert whole.shape == (1, 4, 5)
    torch.testing.assert_close(variant.scores(q, 3), whole[..., :3])
    assert 0 < variant.token_bytes(8, 64) < math.inf
    assert variant.state_bytes() >= 0


def draw_wide():
    """As ``draw``, small, with head_dim 64: some variants of the catalogue keep 64 directions."""
    g = torch.Generator().manual_seed(3)
    keys, q = torch.randn(1, 340, 64, generator=g), torch.randn(1, 4, 64, generator=g)
    return keys[:, :300], keys[:, 300:].unflatten(1, (5, 8)), q, q.mT @ q / 4


@pytest.mark.parametrize("quantiser", [Levels(24), Product(3, 3), ChunkScale(8, 4)], ids=lambda q: q.name)
def test_coded_scores_are_those_of_the_keys_it_stands_for(quantiser):
    fit, keys, q, outer = draw()
    variant = Coded("queries", quantiser)
    variant.fit(fit, outer)
    variant.encode(keys)
    basis = fit_basis("queries", fit, outer)
    rebuilt = quantiser.round_trip(basis.coordinates(keys)) @ basis.back[:, None] + basis.mean[:, None, None]
    direct = torch.einsum("nqd,nmcd->nqmc", q, rebuilt).amax(dim=-1)
    torch.testing.assert_close(variant.scores(q, M), direct, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(direct, exact_scores(q, keys), atol=1e-2)


def test_submeans():
    _, keys, q, _ = draw()
    variant = SubMeans(2)
    variant.encode(keys)
    halves = [keys[:, :, : C // 2].mean(dim=2), keys[:, :, C // 2 :].mean(dim=2)]
    direct = torch.maximum(*(torch.einsum("nqd,nmd->nqm", q, half.bfloat16().float()) for half in halves))
    torch.testing.assert_close(variant.scores(q, M), direct, rtol=1e-4, atol=1e-4)
    assert variant.token_bytes(C, D) == 2 * 2 * D / C


@pytest.mark.parametrize("kind", ["mean", "minmax", "cuboid", "sketch"])
def test_shipped_is_what_make_summary_gives(kind):
    fit, keys, q, outer = (x.to(torch.bfloat16).float() for x in draw())
    variant = Shipped(kind, **({"rank": 8, "bits": 4} if kind == "sketch" else {}))
    variant.fit(fit, outer)
    variant.encode(keys)
    summary = make_summary(kind, chunk=C, head_dim=D, dtype=torch.bfloat16, rank=8, bits=4)
    state = summary.fit(fit.bfloat16(), outer)
    codes = summary.encode(state, keys.bfloat16())
    assert torch.equal(variant.scores(q, M), summary.scores(state, codes, q))
    assert variant.token_bytes(C, D) == sum(c.nbytes for c in codes.values()) / (N * M * C)


def test_refitted_is_each_stretch_by_itself():
    fit, keys, q, outer = draw()
    variant = Refitted(lambda: Coded("queries", ChunkScale(4, 4)), 4 * C)
    variant.fit(fit, outer)
    variant.encode(keys)
    parts = []
    for begin in (0, 4, 8):
        alone = Coded("queries", ChunkScale(4, 4))
        alone.fit(keys[:, begin : begin + 4].flatten(1, 2), outer)
        alone.encode(keys[:, begin : begin + 4])
        parts.append(alone.scores(q, min(4, M - begin)))
    torch.testing.assert_close(variant.scores(q, M), torch.cat(parts, dim=-1))
    assert variant.token_bytes(C, D) > Coded("queries", ChunkScale(4, 4)).token_bytes(C, D)


def test_an_outlier_slot_holds_the_worst_key():
    fit, keys, q, outer = draw()
    keys[:, 2, 5] *= 30
    plain, slot = Coded("keys", ChunkScale(3, 2)), WithOutlier(Coded("keys", ChunkScale(3, 2)))
    for variant in (plain, slot):
        variant.fit(fit, outer)
        variant.encode(keys)
    exact = exact_scores(q, keys)[..., 2]
    before, after = ((v.scores(q, M)[..., 2] - exact).abs().mean() for v in (plain, slot))
    assert after < 0.3 * before
    changed = (plain._decoded != slot._inner._decoded).any(dim=-1).sum(dim=2)
    assert (changed == 1).all()
