"""The variants of a run, by set."""

from bench.fidelity.quantisers import ChunkScale, Levels, Product, Truncated
from bench.fidelity.variants import Coded, Refitted, Shipped, SubMeans, Variant, WithOutlier

DEFAULT = "sketch-16x4"
"""The variant that ships as default: kvtier.config's SummaryConfig."""
REPORTED = (
    *("random", "exact", "mean", "minmax", "cuboid", "submeans-4", "sketch-16x4", "sketch-32x4", "keys/16x4"),
    *("keys/pq-10x8", "queries/pq-6x8", "queries/pq-10x8", "queries/pq-9x8+8", "queries/pq-20x8"),
    *("queries/pq-10x8/refit-16384", "queries/levels-80b", "queries/levels-160b"),
)
"""The variants that fidelity.json has a case for; fidelity.md has all."""


def bases() -> list[Variant]:
    """What the coordinates are, at one and the same quantiser."""
    kinds = ("none", "random", "keys", "queries", "spread", "far")
    coded: list[Variant] = [Coded(kind, ChunkScale(16, 4)) for kind in kinds]
    coded += [Coded(kind, ChunkScale(16, 4), centred=False) for kind in ("keys", "queries")]
    coded += [Coded(kind, Truncated(rank)) for kind in ("keys", "queries") for rank in (8, 16, 32)]
    return coded


def shipped() -> list[Variant]:
    """Every kind of ``[summary] kind`` but "exact"; sketches of several ranks and bits."""
    sketches: list[Variant] = [Shipped("sketch", rank=r, bits=b) for r in (8, 16, 32) for b in (2, 4, 8)]
    sketches.append(Shipped("sketch", rank=64, bits=2))
    sketches.append(Shipped("sketch", rank=64, bits=4))
    return [Shipped("mean"), Shipped("minmax"), Shipped("cuboid"), *(SubMeans(n) for n in (2, 4, 8)), *sketches]


def quantisers() -> list[Variant]:
    """How the coordinates of the queries' basis are stored, over the range of bytes."""
    found: list[Variant] = [
        Coded("queries", ChunkScale(*rank_bits)) for rank_bits in ((8, 4), (12, 4), (32, 2), (32, 3), (32, 4))
    ]
    found += [Coded("queries", ChunkScale(16, bits, 8)) for bits in (3, 4)]
    found += [Coded("queries", Levels(total)) for total in (32, 48, 64, 80, 128)]
    found += [Coded("queries", Levels(profile)) for profile in PROFILES]
    found += [Coded("queries", Product(groups)) for groups in (4, 6, 8, 10, 16)]
    found += [Coded("queries", Product(20, 4)), Coded("queries", Product(9, coarse=8))]
    return found


PROFILES = (
    (4,) * 16 + (2,) * 8,
    (8,) * 4 + (4,) * 4 + (2,) * 12 + (1,) * 8,
    (6, 5, 5, 4, 4) + (3,) * 6 + (2,) * 11 + (1,) * 16,
)
"""80 bits for all heads alike."""


def extras() -> list[Variant]:
    """Running updates and an outlier slot, each beside the plain variant of ``quantisers``."""
    return [
        Refitted(lambda: Coded("queries", ChunkScale(16, 4)), 4096),
        Refitted(lambda: Coded("queries", Product(10)), 16384),
        WithOutlier(Coded("queries", ChunkScale(12, 4))),
        WithOutlier(Coded("queries", Product(8))),
        Coded("keys", Product(10)),
    ]


SETS = {"shipped": shipped, "bases": bases, "quantisers": quantisers, "extras": extras}


def short() -> list[Variant]:
    """Those that a decision is between."""
    return [
        Shipped("mean"),
        Shipped("minmax"),
        Shipped("cuboid"),
        SubMeans(4),
        Shipped("sketch", rank=16, bits=4),
        Shipped("sketch", rank=32, bits=4),
        Coded("keys", Product(10)),
        Coded("keys", ChunkScale(16, 4)),
        Coded("queries", ChunkScale(16, 4)),
        Coded("queries", Levels(PROFILES[0])),
        Coded("queries", Levels(PROFILES[2])),
        *(Coded("queries", Levels(total)) for total in (48, 64, 80, 160)),
        *(Coded("queries", Product(groups)) for groups in (6, 8, 10, 20)),
        Coded("queries", Product(9, coarse=8)),
        Refitted(lambda: Coded("queries", Product(10)), 16384),
    ]
