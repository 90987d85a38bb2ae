"""Inside an offload block, with every chunk selected, a model computes what transformers' own sdpa attention does."""

import functools

import pytest
import torch
from models import (
    CACHE_NAME,
    VOCAB,
    WINDOW,
    cache_of,
    minimum_budget,
    prompt,
    rope_parameters,
    settings,
    tiny_llama,
    token_bytes,
)

import kvtier

TOLERANCE = 1e-4
PROMPT, STEPS = 140, 205
"""210 decode steps and more stay within the trained window of 512."""
ROPES = ["default", "linear", "llama3", "yarn"]
SHAPES = {
    "1:1-dim16": {"heads": 2, "kv_heads": 2, "head_dim": 16},
    "4:1-dim16": {"heads": 4, "kv_heads": 1, "head_dim": 16},
    "4:1-dim32": {"heads": 8, "kv_heads": 2, "head_dim": 32},
    "8:1-dim32": {"heads": 8, "kv_heads": 1, "head_dim": 32},
    "8:1-dim64": {"heads": 16, "kv_heads": 2, "head_dim": 64},
    "1:1-dim64": {"heads": 4, "kv_heads": 4, "head_dim": 64},
}
CHUNKS = {"chunk1": (1, 4), "chunk5": (5, 7), "chunk8": (8, 16), "chunk32": (32, 20)}  # chunk, local
GREEDY = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@functools.cache
def model_of(shape, rope="default"):
    return tiny_llama(rope=rope, **SHAPES[shape])


@functools.cache
def stock(shape, rope="default"):
    """Greedy generation of a model of its own, never in a block: all tokens [1, n], logits of each step [STEPS, V]."""
    model = tiny_llama(rope=rope, **SHAPES[shape])
    assert model.config._attn_implementation == "sdpa"
    return greedy(model, prompt(PROMPT))


def greedy(model, ids, steps=STEPS, **arguments):
    out = model.generate(ids, max_new_tokens=steps, **GREEDY, **arguments)
    return out.sequences, torch.cat(out.logits)


def assert_equal_to(expected, actual):
    """Greedy tokens identical and logits within the tolerance; both are (tokens, logits)."""
    assert actual[0].tolist() == expected[0].tolist()
    difference = (actual[1] - expected[1]).abs().max().item()
    assert difference < TOLERANCE


def all_logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def chunks_held(kv):
    return {name: tier["chunks"] for name, tier in kv.stats()["tiers"].items()}


# -- decode and prefill against sdpa ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_equals_sdpa(shape, rope):
    model = model_of(shape, rope)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache()
        assert_equal_to(stock(shape, rope), greedy(model, prompt(PROMPT), past_key_values=cache))
        assert kv.stats()["tiers"]["device"]["hits"] > 0, "no chunk left the window: nothing was tested"


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_of_all_prompt_tokens_equal_sdpa(shape, rope):
    model, ids = model_of(shape, rope), prompt(400)
    expected = all_logits(model, ids)
    with kvtier.offload(model, settings()):
        actual = all_logits(model, ids)
    assert actual.shape == (1, 400, VOCAB)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["sketch", "exact"])
@pytest.mark.parametrize("block", [1, 7, 32, 64, 150])
def test_every_block_size_equals_sdpa(block, kind):
    model = model_of("4:1-dim32")
    with kvtier.offload(model, settings(block=block, kind=kind)):
        assert_equal_to(stock("4:1-dim32"), greedy(model, prompt(PROMPT)))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_every_chunk_size_equals_sdpa(chunk):
    model, (size, local) = model_of("4:1-dim32"), CHUNKS[chunk]
    with kvtier.offload(model, settings(chunk=size, local=local)):
        assert_equal_to(stock("4:1-dim32"), greedy(model, prompt(PROMPT)))


@pytest.mark.parametrize("sink", [0, 1, 50])
def test_every_number_of_sinks_equals_sdpa(sink):
    model = model_of("4:1-dim32")
    with kvtier.offload(model, settings(sink=sink)):
        assert_equal_to(stock("4:1-dim32"), greedy(model, prompt(PROMPT)))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 19, 20, 21, 27, 28, 29, 60])
def test_short_prompts_equal_sdpa(n):
    """Lengths around sink (4), sink + local (20) and the first chunk that leaves the window (28)."""
    model = model_of("4:1-dim32")
    expected = greedy(model, prompt(n), 12)
    with kvtier.offload(model, settings()):
        assert_equal_to(expected, greedy(model, prompt(n), 12))


def test_reattention_with_everything_in_the_local_window_equals_sdpa():
    model = model_of("4:1-dim32")
    config = settings(local=400, select=2, attention={"method": "reattention"})
    with kvtier.offload(model, config):
        assert_equal_to(stock("4:1-dim32"), greedy(model, prompt(PROMPT)))


def test_the_comparison_can_fail():
    """Attention matters in these models: without the chunks the logits differ by far more than the tolerance."""
    model = model_of("4:1-dim32")
    with kvtier.offload(model, settings(select=0)):
        tokens, logits = greedy(model, prompt(PROMPT))
    assert (logits[0] - stock("4:1-dim32")[1][0]).abs().max() > 100 * TOLERANCE
    assert tokens.tolist() != stock("4:1-dim32")[0].tolist()


@pytest.mark.parametrize("rope", ROPES)
def test_ropes_differ(rope):
    """Each rope type changes the outputs, or one test would stand for all."""
    others = [stock("4:1-dim16", other)[1][0] for other in ROPES if other != rope]
    assert all((stock("4:1-dim16", rope)[1][0] - other).abs().max() > 10 * TOLERANCE for other in others)


# -- positions of a family --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rope", [*ROPES, "dynamic"])
def test_the_window_is_the_trained_one(rope):
    model = tiny_llama(rope=rope)
    assert kvtier.offload(model).geometry.max == WINDOW
    with pytest.raises(kvtier.ConfigError, match=r"max = 513 exceeds the model's trained window of 512"):
        kvtier.offload(model, {"attention": {"max": 513}})


def test_yarn_without_an_original_window_was_trained_on_all_positions():
    """transformers fills in max_position_embeddings, and computes the frequencies with it."""
    rope = {k: v for k, v in rope_parameters("yarn").items() if k != "original_max_position_embeddings"}
    model = tiny_llama(max_position_embeddings=640, rope_parameters=rope)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 640
    assert kvtier.offload(model).geometry.max == 640


# -- tiers ------------------------------------------------------------------------------------------------------------


def tiny_budgets(model, config, path):
    """``config`` with the smallest budgets that kvtier accepts and a store: every tier must be used."""
    gpu, host = (minimum_budget(model, config, name) for name in ("gpu", "host"))
    return {**config, "budget": {"gpu": gpu, "host": host, "disk": "16MiB"}, "store": {"path": str(path / "store")}}


@pytest.mark.parametrize("kind", ["sketch", "exact"])
@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_three_tiers_equal_sdpa(tmp_path, rope, kind):
    model = model_of("4:1-dim32", rope)
    config = tiny_budgets(model, settings(kind=kind, select=44), tmp_path)
    with kvtier.offload(model, config) as kv:
        cache = kv.new_cache()
        assert_equal_to(stock("4:1-dim32", rope), greedy(model, prompt(PROMPT), past_key_values=cache))
        tiers = kv.stats()["tiers"]
    assert all(tier["chunks"] > 0 for tier in tiers.values())
    assert all(tier["bytes_read"] > 0 for name, tier in tiers.items() if name != "device")
    assert all(tier["bytes"] <= tier["budget"] for tier in tiers.values())
    assert tiers["device"]["misses"] > tiers["device"]["chunks"], "nothing was evicted"


def test_three_tiers_with_forks_equal_sdpa(tmp_path):
    """Windows of forks are parked in the host budget; chunks move while several sequences take turns."""
    model, book, questions = model_of("4:1-dim32"), prompt(300), [prompt(20, seed) for seed in (1, 2, 3)]
    expected = [greedy(model, torch.cat((book, question), 1), 30) for question in questions]
    config = settings(select=44)
    need = minimum_budget(model, config, "host") + 3 * 100 * token_bytes(model)  # parked windows
    config = tiny_budgets(model, config, tmp_path)
    config["budget"] |= {"gpu": "32MiB", "host": need}
    with kvtier.offload(model, config) as kv:
        cache = kv.prefill(book)
        forks = [cache.fork() for _ in questions]
        for fork, question, (tokens, logits) in zip(forks, questions, expected, strict=True):
            actual = greedy(model, question, 30, past_key_values=fork)
            assert_equal_to((tokens[:, 300:], logits), actual)
        assert all(n > 0 for n in chunks_held(kv).values())


def test_one_tier_equals_sdpa():
    """A window that holds everything: no chunk is ever made."""
    model = model_of("4:1-dim32")
    with kvtier.offload(model, settings(local=420, select=1)) as kv:
        cache = kv.new_cache()
        assert_equal_to(stock("4:1-dim32"), greedy(model, prompt(PROMPT), past_key_values=cache))
        assert chunks_held(kv) == {"device": 0, "host": 0}


# -- appends and sampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1, 1), (100, 1, 50), (33, 200, 2, 90)], ids=str)
def test_appends_equal_sdpa(sizes):
    """The logits of all tokens, whatever pieces they come in."""
    model, ids = model_of("8:1-dim64"), prompt(sum(sizes))
    expected = all_logits(model, ids)
    with kvtier.offload(model, settings()) as kv, torch.no_grad():
        cache = kv.new_cache()
        pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(list(sizes), dim=1)]
        assert cache.get_seq_length() == ids.shape[1]
        assert cache.token_ids.tolist() == ids[0].tolist()
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=TOLERANCE, rtol=0)


def test_turns_of_a_conversation_equal_sdpa():
    """prefill, generate, a second question, generate: the tokens and logits of stock generate on the whole text."""
    model, book, questions = model_of("4:1-dim32"), prompt(100), (prompt(30, 1), prompt(40, 2))
    text, expected = book, []
    for question in questions:
        text, logits = greedy(model, torch.cat((text, question), 1), 50)
        expected.append((text, logits))
    with kvtier.offload(model, settings()) as kv:
        cache, text = kv.prefill(book), book
        for question, turn in zip(questions, expected, strict=True):
            text, logits = greedy(model, torch.cat((text, question), 1), 50, past_key_values=cache)
            assert_equal_to(turn, (text, logits))


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.6}, {"top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.3}],
    ids=["plain", "temperature", "top_k", "top_p", "repetition_penalty"],
)
def test_sampling_with_a_seed_gives_the_stock_tokens(how):
    model, ids = model_of("4:1-dim32"), prompt(PROMPT)

    def sample():
        torch.manual_seed(7)
        return model.generate(ids, max_new_tokens=60, do_sample=True, **how).tolist()

    expected = sample()
    assert expected != model.generate(ids, max_new_tokens=60, do_sample=False).tolist()
    with kvtier.offload(model, settings()):
        assert sample() == expected


def test_stock_generation_is_what_is_compared_with():
    """The reference runs sdpa on transformers' own cache, outside of any block."""
    model = model_of("4:1-dim32")
    out = model.generate(prompt(5), max_new_tokens=2, **GREEDY)
    assert model.config._attn_implementation == "sdpa"
    assert type(cache_of(out)).__name__ == "DynamicCache"
    assert CACHE_NAME in ("cache", "past_key_values")


# -- contexts beyond the window ---------------------------------------------------------------------------------------


def small_window(window, **other):
    return settings(window=window, sink=2, local=8, chunk=4, block=window // 4, **other)


def read_far_beyond(model, window, config):
    """Read 40 windows and generate; returns the generated tokens and the block."""
    with kvtier.offload(model, config) as kv:
        book = kv.prefill(prompt(40 * window))
        out = model.generate(prompt(9, 1), past_key_values=book, max_new_tokens=40, do_sample=False)
        assert book.get_seq_length() == 40 * window + 9 + 39
    return out, kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sketch", "exact"])
@pytest.mark.parametrize("window", [64, 128])
def test_forty_windows_stay_within_the_bound(window, kind, dtype):
    model = tiny_llama(window=window, dtype=dtype)
    config = small_window(window, kind=kind)
    (tokens, kv), geometry = read_far_beyond(model, window, config), kvtier.offload(model, config).geometry
    longest = kv.stats()["longest_attended"]
    assert longest <= geometry.bound <= window
    assert longest > geometry.bound - geometry.chunk, "the bound is not reached: something is not attended"
    assert tokens.shape == (1, 49)


@pytest.mark.parametrize("rope", ROPES)
def test_forty_windows_of_every_rope(rope):
    window = 64
    model = tiny_llama(window=window, rope=rope)
    tokens, kv = read_far_beyond(model, window, small_window(window))
    assert tokens.shape == (1, 49)
    assert kv.stats()["longest_attended"] <= window


def test_forty_windows_with_nothing_configured():
    model = tiny_llama(window=256, layers=1)
    with kvtier.offload(model) as kv:
        kv.prefill(prompt(40 * 256))
        assert kv.geometry.bound <= 256
        assert kv.stats()["longest_attended"] <= kv.geometry.bound


def test_forty_windows_through_three_tiers_equal_one_budget(tmp_path):
    """Where a chunk happens to be never changes a result."""
    window = 64
    model, config = tiny_llama(window=window), small_window(64)
    tiny = tiny_budgets(model, config, tmp_path)
    tiny["budget"]["gpu"] *= 2  # summaries grow with the context
    assert read_far_beyond(model, window, tiny)[0].tolist() == read_far_beyond(model, window, config)[0].tolist()


def test_no_grad_is_not_needed_and_no_graph_is_kept():
    model = model_of("4:1-dim32")
    with kvtier.offload(model, settings()):
        assert not model(prompt(40)).logits.requires_grad


def test_inference_mode_works_and_the_cache_goes_on_outside_of_it():
    model, ids = model_of("4:1-dim32"), prompt(80)
    expected = all_logits(model, ids)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache()
        with torch.inference_mode():
            first = model(ids[:, :50], past_key_values=cache).logits.clone()
        second = model(ids[:, 50:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat((first, second), 1), expected, atol=TOLERANCE, rtol=0)
