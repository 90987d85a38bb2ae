"""Triton's attention of a layer beside torch's, in the whole engine: the interpreter runs it where there is no GPU."""

import dataclasses

import pytest
import torch
from engines import Case, make_geometry, random_tokens, tiered
from interpreter import repair

from kvtier.kernels.attend import Logits
from kvtier.kernels.backend import triton
from kvtier.runtime import layer_attention
from kvtier.runtime.layer_attention import TorchAttention, TritonAttention, make_attention

pytestmark = pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="needs Triton's interpreter")


class WithSliding(Case):
    """Layer 0 slides over 5 tokens."""

    @property
    def shape(self):
        full = super().shape
        return type(full)(**{name: getattr(full, name) for name in full.__slots__}
                          | {"sliding_layers": frozenset({0}), "sliding_window": 5})  # fmt: skip


def outputs(case, triton_attention, logits):
    """What an engine gives for a sequence of several blocks and decode steps, [L, H, n, D]."""
    tokens = random_tokens(case, 46)
    with tiered(case) as rig:
        if triton_attention:
            rig.engine._attention = TritonAttention(case.shape, case.geometry)
        rig.attend = lambda sequence, layer, block: rig.engine.attend(
            sequence, layer, block.q[layer], block.k[layer], block.v[layer], logits
        )
        sequence = rig.new()
        out = [rig.feed(sequence, tokens[:40]), *(rig.feed(sequence, tokens[i : i + 1]) for i in range(40, 46))]
        return torch.cat(out, dim=2)


CASES = {
    "chunks": (Case, Logits(0.3)),
    "sliding": (WithSliding, Logits(0.3)),
    "softcap": (Case, Logits(0.3, softcap=3.0)),
    "sink": (Case, Logits(0.3, sink=torch.tensor([0.5, -1.0, 2.0, 0.1]))),
}


@pytest.mark.parametrize("name", CASES)
def test_triton_gives_what_torch_gives(name):
    repair()
    kind, logits = CASES[name]
    case = kind(make_geometry(sink=3, local=6, chunk=4, select=2, block=8), n_layers=2, head_dim=16)
    torch.testing.assert_close(outputs(case, True, logits), outputs(case, False, logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("head_dim", "why"), [(8, "head_dim 8 is not a multiple of 16"), (16, "not installed")])
def test_torch_on_cuda_says_why(monkeypatch, head_dim, why):
    monkeypatch.setattr(layer_attention, "TorchAttention", lambda shape, geometry: "torch")
    monkeypatch.setattr(layer_attention, "runs_triton", lambda x: False)
    monkeypatch.setattr(layer_attention.torch, "empty", lambda *size, device: None)
    case = Case(head_dim=head_dim)
    shape = dataclasses.replace(case.shape, device=torch.device("cuda"))
    with pytest.warns(UserWarning, match=f"attention runs in torch, more slowly than in Triton: .*{why}"):
        assert make_attention(shape, case.geometry, {head_dim}) == "torch"


def test_without_a_gpu_torch_is_chosen():
    case = Case(head_dim=16)
    assert type(make_attention(case.shape, case.geometry, {16})) is TorchAttention
