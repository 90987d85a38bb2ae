"""What ships keeps its fidelity on keys and queries of SmolLM2, recorded once (bench.fidelity.excerpt).

Four KV heads of four layers, 4,096 tokens of prose, 27 of up to 101 chunks selected, 2,048 attended tokens. The floors
lie 0.01 under what was measured on the CPU: not for noise, of which there is none, but for another torch.
"""

from pathlib import Path

import pytest
import torch
from fidelity_cases import one_thread  # noqa: F401

from bench.fidelity import metrics
from bench.fidelity.analyse import weigh
from bench.fidelity.excerpt import Excerpt
from bench.fidelity.quantisers import ChunkScale
from bench.fidelity.variants import Coded, Shipped
from kvtier.config import SummaryConfig
from kvtier.kernels.select import top_chunks

FILE = Path(__file__).parent / "data" / "fidelity_smollm2.safetensors"
MARGIN = 0.01
MEASURED = {"prefill": 0.8364, "tail": 0.8009, "decode": 0.6759}
"""Recall of the default, on 3 prefill blocks, 2 questions and 16 decode steps, mean of the four heads."""


@pytest.fixture(scope="module")
def excerpt():
    return Excerpt(FILE)


def recall(variant, excerpt):
    """Mean recall of the exact choice, by phase."""
    variant.fit(excerpt.fit_keys, excerpt.q_outer)
    variant.encode(excerpt.keys)
    found = {}
    for question in excerpt.questions:
        chosen = top_chunks(weigh(variant, question), excerpt.geometry.select)
        found.setdefault(question.step.phase, []).append(metrics.recall(chosen, question.chosen, question.n_chunks))
    return {phase: torch.stack(values).mean().item() for phase, values in found.items()}


@pytest.fixture(scope="module")
def default(excerpt):
    config = SummaryConfig()
    assert config.kind == "sketch"
    variant = Shipped(config.kind, rank=config.rank, bits=config.bits)
    return variant, recall(variant, excerpt)


def test_the_recording_is_what_it_says(excerpt):
    assert FILE.stat().st_size < 2_000_000
    assert excerpt.keys.shape == (4, 101, 32, 64)
    phases = [question.step.phase for question in excerpt.questions]
    assert {phase: phases.count(phase) for phase in phases} == {"prefill": 3, "tail": 2, "decode": 16}
    assert all(question.n_chunks > excerpt.geometry.select == 27 for question in excerpt.questions)
    rows = excerpt.questions[0].rows
    assert rows.shape == (4, 3 * 16, 64)  # three query heads per KV head, 16 queries that choose
    assert rows.std() > 0.1


@pytest.mark.parametrize("phase", MEASURED)
def test_the_default_s_recall(default, phase):
    assert default[1][phase] >= MEASURED[phase] - MARGIN


@pytest.mark.parametrize("phase", MEASURED)
@pytest.mark.parametrize("other", ["mean", "minmax", "cuboid", "keys"])
def test_the_default_beats_the_rest(excerpt, default, others, other, phase):
    """In decode 0.54 (mean), 0.49 (minmax, cuboid) and 0.55 (the keys' basis, at equal bytes) were measured.

    The least lead is that over the mean in prefill, 0.07. The queries' basis chooses more of the exact chunks than the
    default (0.89, 0.86, 0.70), and finds fewer needles: docs/summaries.md.
    """
    assert default[1][phase] > others[other][phase] + 0.05


@pytest.fixture(scope="module")
def others(excerpt, default):
    keys = Coded("keys", ChunkScale(16, 4))
    assert keys.token_bytes(32, 64) == default[0].token_bytes(32, 64) == 9.0
    variants = {"keys": keys} | {kind: Shipped(kind) for kind in ("mean", "minmax", "cuboid")}
    return {name: recall(variant, excerpt) for name, variant in variants.items()}


def test_exact_is_exact(excerpt):
    assert recall(Shipped("exact"), excerpt) == dict.fromkeys(MEASURED, 1.0)
