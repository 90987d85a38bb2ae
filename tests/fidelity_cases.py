"""What the tests of bench.fidelity share: draws of keys and queries, and a capture in memory."""

import pytest
import torch

from bench.fidelity.analyse import Row
from kvtier.runtime.geometry import Geometry

N, M, C, D = 2, 9, 8, 16


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(seed=0, n_fit=200):
    """Fit keys, keys of chunks, queries and their second moment; dimensions of unlike size, as real ones have."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.logspace(0.5, -1.5, D)
    mix = torch.randn(N, D, D, generator=g)
    keys = (torch.randn(N, n_fit + M * C, D, generator=g) * spread) @ mix + torch.randn(N, 1, D, generator=g)
    q = (torch.randn(N, 64, D, generator=g) * spread.flip(0)) @ mix + 0.5
    return keys[:, :n_fit], keys[:, n_fit:].unflatten(1, (M, C)), q, q.mT @ q / q.shape[1]


class Held:
    """A capture in memory: random K, V and q of one layer, with the attributes that metrics and problems use."""

    def __init__(self, geometry, tokens, sizes, *, heads=4, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.k, self.v = torch.randn(2, N, tokens, D, generator=g)
        self.scaling, self.layer = 0.3, 0
        angles = torch.arange(geometry.bound)[:, None] * torch.logspace(0, -3, D // 2)
        self.cos, self.sin = (torch.cat((f(angles), f(angles)), dim=1) for f in (torch.cos, torch.sin))
        self._q = {size: torch.randn(heads, size, D, generator=g) for size in sizes}
        self.meta = type("Meta", (), {"kv_heads": N, "heads": heads, "tokens": tokens, "spans": []})

    def q(self, step):
        return self._q[step.size]

    def kv_until(self, step):
        return self.k[:, : step.start + step.size], self.v[:, : step.start + step.size]


SMALL = Geometry(max=70, sink=3, local=9, chunk=4, select=4, block=16, queries=4, tail=5)


def row(variant, **given):
    """A made-up row of an analysis; what is not given is the same for all."""
    same = {"model": "m", "text": "prose", "tokens": 100, "chunk": 32, "layer": 0, "step": "s", "phase": "prefill"}
    same |= {"bytes": 9.0, "state_bytes": 0.0, "build_seconds": 0.0, "needle": None, "error": 0.1}
    same |= dict.fromkeys(("recall", "worst_head", "picks", "seeds", "jaccard"), 0.5)
    return Row(variant=variant, **same | given)
