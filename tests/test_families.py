"""Model families: each equals transformers' own attention and runs far beyond its window, or is refused."""

import contextlib
import copy
import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from engines import Case, Tokens, make_geometry, reattention, tiered
from models import PAD, VOCAB, assert_untouched, fingerprint, prompt, settings
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import kvtier
from kvtier import attention, families
from kvtier.kernels.attend import Logits, attend, rotate
from kvtier.rope import rotary_tables, trained_window
from kvtier.runtime.model import Rotary

TOLERANCE = 1e-4
WINDOW = 256
PROMPT, STEPS = 120, 100
"""The prompt is about five chunks longer than sinks and window; all of it stays within the trained window."""
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.1,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": WINDOW}
STRETCHED = {"max_position_embeddings": 4 * WINDOW}
HYBRID = {
    "num_hidden_layers": 4,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
TWO_ROPES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
    }
}
TWO_ROPES_STRETCHED = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
}

TINY_NEXT = {
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    **EXPERTS,
}


def longrope(partial=1.0, head_dim=8):
    """Phi-3's: short and long factors differ, and attention_scaling is sqrt(1 + log 4 / log 256) = 1.118."""
    n = int(head_dim * partial) // 2
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(n)], "long_factor": [3.0 + i for i in range(n)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "partial_rotary_factor": partial, **factors}
    return {**STRETCHED, "original_max_position_embeddings": WINDOW, "rope_parameters": rope}


FAMILIES = {
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-head_dim": ("MistralConfig", {"sliding_window": None, "head_dim": 16}),
    "mistral-wide": ("MistralConfig", {"sliding_window": WINDOW}),  # masks nothing within the trained window
    "qwen2": ("Qwen2Config", {}),
    "qwen2-yarn": ("Qwen2Config", {**STRETCHED, "rope_parameters": YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mixtral": ("MixtralConfig", {"sliding_window": None, "num_local_experts": 4}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "head_dim": 8, **EXPERTS}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": WINDOW}),
    "phi3-partial": (
        "Phi3Config",
        {"original_max_position_embeddings": WINDOW, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "phi3-longrope": ("Phi3Config", longrope()),
    "phi4-mini": ("Phi3Config", {**longrope(0.75), "sliding_window": 64 * WINDOW}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.6, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    ),
    "smollm3": ("SmolLM3Config", {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "smollm3-yarn": (
        "SmolLM3Config",
        {"no_rope_layers": [0, 1, 1], "num_hidden_layers": 3, **STRETCHED, "rope_parameters": YARN},
    ),
    "gemma": ("GemmaConfig", {"head_dim": 16}),
    "starcoder2": ("Starcoder2Config", {}),
    "stablelm": ("StableLmConfig", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "stablelm-norm": ("StableLmConfig", {"qk_layernorm": True, "use_parallel_residual": True}),
    "phi": ("PhiConfig", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi-norm": ("PhiConfig", {"qk_layernorm": True}),
    "qwen2-hybrid": ("Qwen2Config", {**HYBRID, "use_sliding_window": True}),
    "qwen3-hybrid": ("Qwen3Config", {**HYBRID, "use_sliding_window": True, "head_dim": 16}),
    "smollm3-hybrid": ("SmolLM3Config", {**HYBRID, "use_sliding_window": True, "no_rope_layer_interval": 2}),
    "gemma2": ("Gemma2Config", {**HYBRID, "head_dim": 16, "attn_implementation": "eager"}),
    "gemma3": ("Gemma3TextConfig", {**HYBRID, "head_dim": 16, "query_pre_attn_scalar": 20, **TWO_ROPES}),
    "gemma3-linear": (
        "Gemma3TextConfig",
        {**HYBRID, "head_dim": 8, **STRETCHED, **TWO_ROPES_STRETCHED},
    ),
    "olmo3": ("Olmo3Config", {**HYBRID, **TWO_ROPES}),
    "gpt-oss": (
        "GptOssConfig",
        {
            **HYBRID,
            **STRETCHED,
            "rope_parameters": YARN,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attn_implementation": "eager",
        },
    ),
    "glm": ("GlmConfig", {"head_dim": 16, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "glm4": ("Glm4Config", {"head_dim": 8, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "cohere": ("CohereConfig", {"use_qk_norm": True}),
    "cohere2": ("Cohere2Config", HYBRID),
    "ernie4_5": ("Ernie4_5Config", {"head_dim": 8}),
    "ernie4_5-moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    ),
    "helium": ("HeliumConfig", {"head_dim": 8}),
}
HYBRIDS = [name for name, (_, own) in FAMILIES.items() if "layer_types" in own]


def tiny(kind, seed=0, **settings_of_family):
    """A random model of a family in eval mode with a config of its own."""
    merged = COMMON | settings_of_family
    if "full_attention" not in merged.get("rope_parameters", ["full_attention"]):
        merged["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, **merged["rope_parameters"]}
    config = getattr(transformers, kind)(**merged)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, weight in model.named_parameters():  # transformers starts biases at 0 and norms at 1: hardly a test
        if weight.ndim == 1:
            weight.data += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
    return model


@functools.cache
def model_of(family):
    kind, own = FAMILIES[family]
    return tiny(kind, **own)


def greedy(model, ids, steps=STEPS, **arguments):
    out = model.generate(ids, max_new_tokens=steps, **GREEDY, **arguments)
    return out.sequences, torch.cat(out.logits)


@functools.cache
def stock(family):
    return greedy(model_of(family), prompt(PROMPT))


def chosen_all(**other):
    return settings(window=WINDOW, **other)


def distance(model, expected, config=None):
    """Largest difference of the first logits, with every chunk selected."""
    with kvtier.offload(model, config or chosen_all()):
        return (greedy(model, prompt(PROMPT), 1)[1][0] - expected[1][0]).abs().max().item()


# -- families that are served ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_sdpa_and_is_restored(family):
    model, expected = model_of(family), stock(family)
    before = fingerprint(model)
    with kvtier.offload(model, chosen_all()) as kv:
        cache = kv.new_cache()
        tokens, logits = greedy(model, prompt(PROMPT), past_key_values=cache)
        assert kv.stats()["tiers"]["device"]["hits"] > 0, "no chunk left the window: nothing was tested"
        assert cache.get_seq_length() == PROMPT + STEPS - 1
    assert tokens.tolist() == expected[0].tolist()
    assert (logits - expected[1]).abs().max().item() < TOLERANCE
    assert_untouched(model, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_comparison_can_fail(family):
    """Without the chunks the logits differ by far more than the tolerance."""
    assert distance(model_of(family), stock(family), chosen_all(select=0)) > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_times_the_trained_window(family):
    model, n = model_of(family), 20 * WINDOW
    assert trained_window(model.config) == WINDOW
    config = settings(window=WINDOW, local=64, block=64)
    with kvtier.offload(model, config) as kv:
        assert kv.geometry.max == WINDOW
        cache = kv.new_cache()
        tokens, logits = greedy(model, prompt(n), 8, past_key_values=cache)
        assert cache.get_seq_length() == n + 7  # the cache that was given, not another one
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()
        assert WINDOW - 72 <= kv.stats()["longest_attended"] <= kv.geometry.max
        assert kv.stats()["tiers"]["device"]["chunks"] > 0
    assert logits.isfinite().all()


@pytest.mark.parametrize("family", ["mistral", "phi4-mini", "smollm3-yarn", "phi", "gemma3", "gpt-oss", "cohere2"])
def test_reattention_equals_sdpa(family):
    model, (expected_tokens, expected) = model_of(family), stock(family)
    config = settings(window=WINDOW, local=200, select=1, attention={"method": "reattention"})
    with kvtier.offload(model, config):
        tokens, logits = greedy(model, prompt(PROMPT), 60)
    assert tokens.tolist() == expected_tokens[:, : PROMPT + 60].tolist()
    assert (logits - expected[:60]).abs().max().item() < TOLERANCE


@pytest.mark.parametrize(
    "family", ["qwen2", "mixtral", "olmo2", "smollm3-yarn", "phi4-mini", "gemma2", "gpt-oss", "glm4"]
)
def test_half_precision(family):
    """The identity rotary promotes nothing: keys reach the cache in bfloat16, outputs are near stock's."""
    kind, own = FAMILIES[family]
    model = tiny(kind, **own).to(torch.bfloat16)
    expected = model(prompt(PROMPT)).logits
    with kvtier.offload(model, chosen_all()) as kv:
        assert kv._runtime.engine.shape.dtype == torch.bfloat16
        actual = model(prompt(PROMPT)).logits
    assert actual.dtype == torch.bfloat16
    error = (actual - expected).float().norm() / expected.float().norm()
    assert error < 0.03  # bfloat16 has 8 bits of mantissa; a wrong rotation gives 0.2 and more


def test_every_supported_class_is_tested():
    """The exact class of the model's attention is listed, and every listed class but Llama has a model here."""
    listed = {
        type(m).__name__ for f in FAMILIES for m in model_of(f).modules() if type(m).__name__.endswith("Attention")
    }
    assert {name.rsplit(".", 1)[1] for name in families.FAMILIES} == listed | {"LlamaAttention"}


# -- layers with a sliding window --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", HYBRIDS)
def test_sliding_layers_are_not_tiered(family):
    model = model_of(family)
    with kvtier.offload(model, chosen_all()) as kv:
        cache = kv.prefill(prompt(PROMPT))
        layers = cache._lane.sequences[0].layers
        assert [layer.retired > 0 for layer in layers] == [
            kind == "full_attention" for kind in model.config.layer_types
        ]


SLIDING_ONLY = {
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "mistral-long": ("MistralConfig", {"sliding_window": WINDOW - 1}),
    "mixtral": ("MixtralConfig", {"sliding_window": 24, "num_local_experts": 4}),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": WINDOW, "sliding_window": 24}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 24}),
}


@pytest.mark.filterwarnings("ignore:every layer has a sliding window")
@pytest.mark.parametrize("method", ["chunks", "reattention"])
@pytest.mark.parametrize("family", SLIDING_ONLY)
def test_models_of_sliding_layers_alone_equal_sdpa_beyond_their_trained_window(family, method):
    """Stock positions go on counting; a sliding layer only ever sees differences of them."""
    kind, own = SLIDING_ONLY[family]
    model, ids = tiny(kind, **own), prompt(2 * WINDOW)
    expected_tokens, expected = greedy(model, ids, 40)
    config = settings(window=WINDOW, local=180, select=1, attention={"method": method})
    with kvtier.offload(model, config) as kv:
        tokens, logits = greedy(model, ids, 40)
        assert kv.stats()["tiers"]["host"]["chunks"] == 0
    assert tokens.tolist() == expected_tokens.tolist()
    assert (logits - expected).abs().max().item() < TOLERANCE


def test_a_model_of_sliding_layers_alone_warns_that_nothing_is_tiered():
    model = tiny("MistralConfig", sliding_window=24)
    with pytest.warns(UserWarning, match="every layer has a sliding window of 24 tokens: what is older is forgotten"):
        kvtier.offload(model, chosen_all())


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_forks_rewinds_and_several_turns_of_hybrids(family):
    """What the sliding layers hold is parked, shared, loaded and forgotten as the rest is."""
    model, (expected_tokens, expected) = model_of(family), stock(family)
    with kvtier.offload(model, chosen_all()) as kv:
        book = kv.prefill(prompt(PROMPT))
        again = book.fork().fork()
        for fork in (book.fork(), book.fork(), book):
            tokens, logits = greedy(model, prompt(PROMPT), past_key_values=fork)  # all cached: rewinds
            assert tokens.tolist() == expected_tokens.tolist()
            assert (logits - expected).abs().max().item() < TOLERANCE
        ids = torch.cat((expected_tokens[:, : PROMPT + 40], prompt(30, seed=3)), dim=1)
        tokens, logits = greedy(model, ids, 20, past_key_values=again)
    assert (logits - greedy(model, ids, 20)[1]).abs().max().item() < TOLERANCE


def test_a_layer_that_passes_another_sliding_window_is_refused(monkeypatch):
    model = model_of("qwen2-hybrid")
    with kvtier.offload(model, chosen_all()), pytest.raises(kvtier.UnsupportedError, match="sliding_window=23"):
        call_with(monkeypatch, model, sliding_window=23)


def test_a_sliding_layer_that_passes_no_sliding_window_is_refused(monkeypatch):
    model = model_of("qwen2-hybrid")
    with kvtier.offload(model, chosen_all()), pytest.raises(kvtier.UnsupportedError, match="sliding_window=None"):
        call_with(monkeypatch, model, sliding_window=None)


def test_sliding_windows_of_different_lengths_are_refused():
    model = tiny("Qwen2Config", **HYBRID, use_sliding_window=True)
    model.model.layers[2].self_attn.sliding_window = 20
    with pytest.raises(kvtier.UnsupportedError, match=r"sliding windows of different lengths \(\[20, 24\]\)"):
        kvtier.offload(model, chosen_all())


@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("window", [1, 3, 12])
@pytest.mark.parametrize(("softcap", "sink"), [(None, False), (2.0, False), (None, True)])
def test_windows_softcap_and_sinks_against_a_direct_computation(softcap, sink, window, block):
    generator = torch.Generator().manual_seed(window + block)
    q, k, v = (torch.randn(heads, n, 8, generator=generator) for heads, n in ((4, block), (2, 12), (2, 12)))
    sinks = torch.randn(4, generator=generator) if sink else None
    tables = tables_for(0, 1.0)
    actual = attend(q, k, v, tables.cos, tables.sin, Logits(0.4, softcap, sinks), window)
    for head, i in np.ndindex(4, block):
        position = 12 - block + i
        part = slice(max(0, position - window + 1), position + 1)
        x = 0.4 * k[head // 2, part].double() @ q[head, i].double()
        x = softcap * torch.tanh(x / softcap) if softcap else x
        weights = x.exp() / (x.exp().sum() + (sinks[head].double().exp() if sink else 0))
        expected = weights @ v[head // 2, part].double()
        torch.testing.assert_close(actual[head, i].double(), expected, atol=1e-5, rtol=0)


# -- positions ---------------------------------------------------------------------------------------------------------


def test_layers_without_positions_are_not_rotated(monkeypatch):
    """SmolLM3: rotating all layers, or none, gives other logits."""
    model, expected = model_of("smollm3"), stock("smollm3")
    (name,) = [n for n, f in families.FAMILIES.items() if f.name == "SmolLM3"]
    assert [layer.rotates for layer in families.examine(model).layers] == [True, False, True, False]
    assert distance(model, expected) < TOLERANCE
    for rotates in (True, False):
        wrong = dataclasses.replace(families.FAMILIES[name], has_positions=lambda m, rotates=rotates: rotates)
        monkeypatch.setitem(families.FAMILIES, name, wrong)
        assert distance(model, expected) > 10 * TOLERANCE


FREQUENCIES = torch.tensor([1.0, 0.3, 0.1, 0.03])


def complex_attention(q, keys, values, inv_freq, attention_scaling, scaling):
    """Rotary by complex numbers in float64: dimension i of R/2 pairs with i + R/2, dimensions from R on stay."""
    half, group = len(inv_freq), q.shape[0] // keys.shape[0]
    n, b = keys.shape[1], q.shape[1]

    def turn(x, positions):
        pairs = x[..., :half] + 1j * x[..., half : 2 * half]
        pairs = pairs * np.exp(1j * positions[:, None] * inv_freq) * attention_scaling
        return np.concatenate([pairs.real, pairs.imag, x[..., 2 * half :]], axis=-1)

    q, keys = turn(q, np.arange(n - b, n)), turn(keys, np.arange(n)).repeat(group, axis=0)
    scores = scaling * q @ keys.transpose(0, 2, 1)
    scores = np.where(np.arange(n) <= np.arange(n - b, n)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values.repeat(group, axis=0)


def tables_for(rotary_dim, attention_scaling, n=12):
    """Tables that turn ``rotary_dim`` of 8 dimensions; 0: those of a layer without positions."""
    module = SimpleNamespace(original_inv_freq=FREQUENCIES[: rotary_dim // 2 or 4], attention_scaling=attention_scaling)
    tables = rotary_tables(module, None, n, torch.device("cpu"))
    return tables if rotary_dim else tables.nowhere()


@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("rotary_dim", [0, 2, 6, 8])
def test_partial_rotary_against_complex_numbers(rotary_dim, block):
    generator = torch.Generator().manual_seed(rotary_dim + block)
    q, k, v = (torch.randn(heads, n, 8, generator=generator) for heads, n in ((4, block), (2, 12), (2, 12)))
    tables = tables_for(rotary_dim, 1.25)
    assert tables.cos.shape == tables.sin.shape == (12, rotary_dim)
    frequencies = FREQUENCIES[: rotary_dim // 2].double().numpy()
    expected = complex_attention(*(x.double().numpy() for x in (q, k, v)), frequencies, 1.25, 0.4)
    actual = attend(q, k, v, tables.cos, tables.sin, Logits(0.4)).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rotary_dim", [0, 4, 8])
def test_the_score_is_that_of_one_position(rotary_dim):
    """attention_scaling counts twice in the rotated dimensions and not at all in the others."""
    q, k = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    tables = tables_for(rotary_dim, 1.5, 9)
    expected = (rotate(q, tables.cos, tables.sin) * rotate(k, tables.cos, tables.sin)).sum(-1)
    torch.testing.assert_close((tables.unplaced(q) * k).sum(-1), expected, atol=1e-5, rtol=0)


@dataclasses.dataclass(frozen=True)
class PartialCase(Case):
    """Two layers with 2 of 4 dimensions rotated, and a third without positions; one head, chunks of one token."""

    def rotaries(self) -> list[Rotary]:
        return [self.rotary(), self.rotary(), self.rotary().nowhere()]

    def rotary(self) -> Rotary:
        full = super().rotary()
        return Rotary(full.cos[:, :2], full.sin[:, :2], full.attention_scaling)


@pytest.mark.parametrize("method", ["chunks", "reattention"])
def test_the_choice_weighs_rotated_dimensions_by_attention_scaling(method):
    """Token 0 scores 3 in a rotated dimension, 3 * 2**2 in effect; token 1 scores 5 in one that is not rotated."""
    case = PartialCase(make_geometry(0, 1, 1, 1, 1), 3, 1, 1, 4, attention_scaling=2.0, scaling=1.0, picks=1)
    keys = torch.tensor([[3.0, 0, 0, 0], [0, 0, 0, 5], [0, 0, 0, 0], [0, 0, 0, 0]]).expand(3, 1, 4, 4)
    tokens = Tokens(torch.ones(3, 1, 4, 4), keys, keys, torch.arange(4))
    with tiered(case) if method == "chunks" else contextlib.nullcontext(reattention(case)) as rig:
        sequence = rig.new()
        for i in range(4):
            rig.block(sequence, tokens[i : i + 1])
        if method == "chunks":
            chosen = [int(layer.squeeze()) for layer in rig.engine.last_chosen]
        else:
            chosen = [int(view[0]) for view in rig.engine.last_view]
    assert chosen == [0, 0, 1]


def test_longrope_is_frozen_at_the_trained_window():
    """The short factors, also after the stock model has read a longer text and switched to the long ones."""
    model, expected = tiny("Phi3Config", **longrope()), stock("phi3-longrope")
    with torch.no_grad():
        model(prompt(WINDOW + 50))
    rotary = model.model.rotary_emb
    assert not torch.equal(rotary.inv_freq, rotary.original_inv_freq), "the stock model did not switch"
    short = torch.tensor([1.0 + 0.1 * i for i in range(4)])
    frequencies = 1 / (short * 1e4 ** (torch.arange(0, 8, 2) / 8))
    angles = torch.arange(WINDOW)[:, None] * frequencies.repeat(2)
    scaling = math.sqrt(1 + math.log(4) / math.log(WINDOW))
    tables = rotary_tables(rotary, None, WINDOW, torch.device("cpu"))
    torch.testing.assert_close(tables.cos, angles.cos() * scaling, atol=1e-5, rtol=0)
    torch.testing.assert_close(tables.sin, angles.sin() * scaling, atol=1e-5, rtol=0)
    assert tables.attention_scaling == pytest.approx(scaling)
    assert distance(model, expected) < TOLERANCE


def test_phi3_keeps_the_cache_when_it_crosses_its_trained_window():
    """Stock Phi-3 drops the cache there and reads everything again."""
    model, ids = model_of("phi3"), prompt(WINDOW - 10)
    with kvtier.offload(model, chosen_all()) as kv:
        cache = kv.new_cache()
        blocks = []
        feed, kv.feed = kv.feed, lambda *a, **k: blocks.append(a[1].shape[1]) or feed(*a, **k)
        tokens, _ = greedy(model, ids, 30, past_key_values=cache)
        assert blocks == [WINDOW - 10] + 29 * [1]
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()


def test_trained_windows_of_published_configs():
    """As published; transformers keeps Phi-3's original_max_position_embeddings in rope_parameters too."""
    long = {"rope_scaling": {"type": "longrope", "short_factor": 48 * [1.0], "long_factor": 48 * [2.0]}}
    published = {
        "Phi-3-mini-128k": (transformers.Phi3Config(max_position_embeddings=131072, **long), 4096),
        "Phi-3-mini-4k": (transformers.Phi3Config(), 4096),
        "Qwen2.5-yarn": (
            transformers.Qwen2Config(
                max_position_embeddings=131072,
                rope_parameters={**YARN, "original_max_position_embeddings": 32768},
            ),
            32768,
        ),
        "SmolLM3": (transformers.SmolLM3Config(max_position_embeddings=65536), 65536),
        "Mistral": (transformers.MistralConfig(max_position_embeddings=32768, sliding_window=None), 32768),
    }
    for name, (config, window) in published.items():
        assert trained_window(config) == window, name


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "deepseek": (
        "DeepseekV3Config",
        {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        r"DeepseekV3Attention \(multi-head latent attention",
    ),
    "ministral3": ("Ministral3Config", {"head_dim": 8}, r"Ministral3Attention \(it scales queries by their position"),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}, r"GPT2Attention \(its positions are not rotary"),
    "olmo": ("OlmoConfig", {}, r"OlmoAttention \(not tested with kvtier\) as model.layers.0.self_attn"),
    "mamba": ("MambaConfig", {"state_size": 4}, r"MambaForCausalLM is not supported: it uses no attention modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case):
    kind, own, message = REFUSED[case]
    model = tiny(kind, **own, attn_implementation=None)  # some have no sdpa
    before = fingerprint(model)
    with pytest.raises(kvtier.UnsupportedError, match=message):
        kvtier.offload(model, chosen_all())
    assert_untouched(model, before)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(kvtier.UnsupportedError, match=r"T5ForConditionalGeneration .* it is an encoder-decoder model"):
        kvtier.offload(model, chosen_all())


def test_linear_attention_layers_are_refused():
    model = tiny("Qwen3NextConfig", **TINY_NEXT)
    with pytest.raises(kvtier.UnsupportedError, match=r"Qwen3NextAttention \(its other layers are linear attention\)"):
        kvtier.offload(model, chosen_all())


def test_a_second_rotary_module_is_refused():
    model = tiny("MistralConfig", sliding_window=None)
    model.model.layers[1].self_attn.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    message = r"2 rotary modules \(model.layers.1.self_attn.rotary_emb, model.rotary_emb\), kvtier handles exactly one"
    with pytest.raises(kvtier.UnsupportedError, match=message):
        kvtier.offload(model, chosen_all())


def test_two_families_in_one_model_are_refused():
    model, other = tiny("MistralConfig", sliding_window=None), tiny("Qwen2Config")
    model.model.layers[1].self_attn = other.model.layers[1].self_attn
    with pytest.raises(kvtier.UnsupportedError, match="mixes attention classes of several families"):
        kvtier.offload(model, chosen_all())


def test_a_language_model_inside_another_model_is_refused(monkeypatch):
    """Images and audio with a known language model: their settings are one level deeper."""
    model = tiny("Qwen2Config")
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, **_: copy.copy(self))
    with pytest.raises(
        kvtier.UnsupportedError, match="Qwen2ForCausalLM is not supported: its language model is a part of it"
    ):
        kvtier.offload(model, chosen_all())


def test_a_bidirectional_gemma_is_refused():
    model = tiny("GemmaConfig", head_dim=8, use_bidirectional_attention=True)
    with pytest.raises(kvtier.UnsupportedError, match=r"layers.0.self_attn \(GemmaAttention\) is bidirectional"):
        kvtier.offload(model, chosen_all())


def test_router_logits_are_refused():
    model = tiny("MixtralConfig", sliding_window=None, num_local_experts=4, output_router_logits=True)
    with pytest.raises(kvtier.UnsupportedError, match=r"config.output_router_logits = True"):
        kvtier.offload(model, chosen_all())


# -- attention calls that kvtier would get wrong -----------------------------------------------------------------------

WRONG_CALLS = {
    "sliding_window": (32, r"sliding_window=32"),
    "dropout": (0.5, r"dropout=0.5"),
    "is_causal": (False, r"is_causal=False"),
    "cu_seq_lens_q": (torch.tensor([0, 5]), r"cu_seq_lens_q=\(2,\)"),
    "something_new": (0, r"something_new=0"),
}


def call_with(monkeypatch, model, **arguments):
    """The model's attention modules call the attention function with more arguments, as another version might."""
    changed = lambda *args, **kwargs: attention.attention(*args, **(kwargs | arguments))  # noqa: E731
    AttentionInterface.register(attention.NAME, changed)
    monkeypatch.setattr(attention, "register", lambda: None)
    try:
        return model(prompt(PROMPT)).logits
    finally:
        monkeypatch.undo()
        attention.register()


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_an_argument_that_would_be_ignored_is_refused(monkeypatch, name):
    value, given = WRONG_CALLS[name]
    model = model_of("qwen2")
    before = fingerprint(model)
    with (
        kvtier.offload(model, chosen_all()),
        pytest.raises(kvtier.UnsupportedError, match=rf"layer 0 \(Qwen2Attention\) calls attention with {given}"),
    ):
        call_with(monkeypatch, model, **{name: value})
    assert_untouched(model, before)


def test_harmless_arguments_are_accepted(monkeypatch):
    model = model_of("qwen2")
    with kvtier.offload(model, chosen_all()):
        expected = model(prompt(PROMPT)).logits
        harmless = {"sliding_window": WINDOW, "softcap": None, "s_aux": None, "dropout": 0.0, "is_causal": True}
        actual = call_with(monkeypatch, model, **harmless, output_attentions=False, cache_position=torch.arange(3))
    assert torch.equal(actual, expected)


def test_a_mask_is_refused():
    model = model_of("qwen2")
    with kvtier.offload(model, chosen_all()) as kv:
        lane = kv.new_cache()._lane
        key = torch.zeros(1, 2, 1, 8)
        key._kvtier = (lane, 1)
        module = model.model.layers[1].self_attn
        with pytest.raises(kvtier.UnsupportedError, match=r"layer 1 \(Qwen2Attention\) passes an attention mask"):
            attention.attention(module, torch.zeros(1, 4, 1, 8), key, key, torch.ones(1, 1, 1, 1), scaling=1.0)
