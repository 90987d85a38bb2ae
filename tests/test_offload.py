"""What a user can do with an offload block, and what the block leaves behind: nothing."""

import copy
import functools
import gc
import warnings
import weakref

import pytest
import torch
from models import (
    CACHE_NAME,
    VOCAB,
    assert_untouched,
    cache_of,
    fingerprint,
    minimum_budget,
    prompt,
    settings,
    tiny_llama,
)
from transformers import Cache, GenerationConfig, StoppingCriteriaList

import kvtier

TOLERANCE = 1e-4
GREEDY = {"do_sample": False, "max_new_tokens": 20}
CACHE_NAMES = ["past_key_values", "cache"]
BOOK, QUESTION = prompt(150), prompt(25, seed=1)
TEXT = torch.cat((BOOK, QUESTION), dim=1)


@pytest.fixture(scope="module")
def shared():
    """A model that the whole module shares: every test but its own must leave it as it was."""
    return tiny_llama()


@pytest.fixture
def model(shared):
    before = fingerprint(shared)
    yield shared
    assert_untouched(shared, before)


@functools.cache
def stock_tokens(n_new=20, ids=TEXT):
    return tiny_llama().generate(ids, do_sample=False, max_new_tokens=n_new)[:, ids.shape[1] :].tolist()


def new_tokens(model, ids, **arguments):
    """The tokens that greedy generate adds to ``ids``."""
    return model.generate(ids, **GREEDY | arguments)[:, ids.shape[1] :].tolist()


def logits_of(model, ids, **arguments):
    with torch.no_grad():
        return model(ids, **arguments).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=TOLERANCE, rtol=0)


# -- the configuration's forms ----------------------------------------------------------------------------------------


TOML = """
[attention]
sink = 4
local = 16
chunk = 8
select = 10
[summary]
rank = 8
[prefill]
block = 32
tail = 8
"""


def as_path(tmp_path):
    path = tmp_path / "kvtier.toml"
    path.write_text(TOML)
    return path


@pytest.mark.parametrize("form", ["path", "str", "dict", "Config"])
def test_every_form_of_a_configuration_means_the_same(model, tmp_path, form):
    path = as_path(tmp_path)
    forms = {
        "path": path,
        "str": str(path),
        "dict": settings(select=10),
        "Config": kvtier.Config.load(path),
    }
    with kvtier.offload(model, forms[form]) as kv:
        g = kv.geometry
        assert (g.sink, g.local, g.chunk, g.select, g.block, g.tail) == (4, 16, 8, 10, 32, 8)
        assert kv.config == kvtier.Config.load(path)


def test_nothing_given_means_defaults(model):
    with kvtier.offload(model) as kv:
        assert kv.config == kvtier.Config()
        assert (kv.geometry.max, kv.geometry.sink, kv.geometry.chunk, kv.geometry.block) == (512, 32, 32, 64)
        assert new_tokens(model, TEXT) == stock_tokens()


# -- caches -----------------------------------------------------------------------------------------------------------


IDS_FORMS = {
    "list": lambda ids: ids[0].tolist(),
    "tuple": lambda ids: tuple(ids[0].tolist()),
    "1-D": lambda ids: ids[0],
    "2-D": lambda ids: ids,
    "int32": lambda ids: ids.int(),
    "numpy": lambda ids: ids[0].numpy(),
    "not-contiguous": lambda ids: ids.repeat_interleave(2, dim=1)[:, ::2],
}


@pytest.mark.parametrize("form", IDS_FORMS)
def test_prefill_takes(model, form):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(IDS_FORMS[form](BOOK))
        assert cache.token_ids.tolist() == BOOK[0].tolist()
        assert new_tokens(model, QUESTION, past_key_values=cache) == stock_tokens()


def test_prefill_shows_progress_if_asked(model, capsys):
    with kvtier.offload(model, settings()) as kv:
        kv.prefill(BOOK, progress=True)
        assert "150/150" in capsys.readouterr().err
        kv.prefill(BOOK, progress=False)
        kv.prefill(BOOK)
        assert capsys.readouterr().err == ""


def test_prefill_select_is_what_the_cache_keeps(model):
    with kvtier.offload(model, settings()) as kv:
        blind = kv.prefill(BOOK, select=0)
        blind_tokens = new_tokens(model, QUESTION, past_key_values=blind)
        assert blind_tokens != stock_tokens()
        assert kv.stats()["longest_attended"] <= kv.geometry.sink + kv.geometry.window_capacity
    with kvtier.offload(model, settings(select=0)) as kv:
        assert new_tokens(model, QUESTION, past_key_values=kv.prefill(BOOK)) == blind_tokens


def test_a_cache_is_a_transformers_cache(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        assert isinstance(cache, Cache)
        assert isinstance(cache, kvtier.TieredCache)
        assert len(cache) == model.config.num_hidden_layers
        assert cache.get_seq_length() == 150
        assert repr(cache) == "TieredCache(150 tokens)"


def test_a_new_cache_is_empty_and_can_be_filled_by_generate(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache()
        assert cache.get_seq_length() == 0
        assert cache.token_ids.shape == (0,)
        assert new_tokens(model, TEXT, past_key_values=cache) == stock_tokens()
        assert cache.get_seq_length() == TEXT.shape[1] + 19


def test_token_ids_are_a_copy(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        cache.token_ids.zero_()
        assert cache.token_ids.tolist() == BOOK[0].tolist()


def test_forks_go_their_own_way(model):
    questions = [prompt(n, seed=n) for n in (1, 12, 40)]
    expected = [stock_tokens(20, torch.cat((BOOK, q), 1)) for q in questions]
    with kvtier.offload(model, settings()) as kv:
        book = kv.prefill(BOOK)
        forks = [book.fork() for _ in questions]
        answers = [new_tokens(model, q, past_key_values=f) for q, f in zip(questions, forks, strict=True)]
        again = [new_tokens(model, q, past_key_values=book.fork()) for q in reversed(questions)]
        assert answers == expected
        assert again == expected[::-1]
        assert book.token_ids.tolist() == BOOK[0].tolist()
        assert new_tokens(model, QUESTION, past_key_values=book) == stock_tokens()


def test_forks_of_forks_that_take_turns_token_by_token(model):
    """Every switch parks one window and loads another; the logits stay those of each whole text."""
    tails = [prompt(20, seed) for seed in (5, 6, 7)]
    expected = [logits_of(tiny_llama(), torch.cat((BOOK, tail), 1))[:, 150:] for tail in tails]
    with kvtier.offload(model, settings()) as kv:
        caches = [kv.prefill(BOOK)]
        caches.append(caches[0].fork())
        caches.append(caches[1].fork())
        steps = [[logits_of(model, t[:, i : i + 1], past_key_values=c) for t, c in zip(tails, caches, strict=True)]
                 for i in range(20)]  # fmt: skip
    for actual, wanted in zip(zip(*steps, strict=True), expected, strict=True):
        close(torch.cat(actual, 1), wanted)


def test_forking_an_empty_cache(model):
    with kvtier.offload(model, settings()) as kv:
        empty = kv.new_cache()
        fork = empty.fork()
        assert new_tokens(model, TEXT, past_key_values=fork) == stock_tokens()
        assert empty.get_seq_length() == 0


def test_a_fork_with_select_0_sees_sinks_and_window_alone(model):
    with kvtier.offload(model, settings()) as kv:
        book = kv.prefill(BOOK)
        assert new_tokens(model, QUESTION, past_key_values=book.fork(select=0)) != stock_tokens()
        assert new_tokens(model, QUESTION, past_key_values=book) == stock_tokens()


@pytest.mark.parametrize("select", [-1, 11])
def test_a_fork_with_a_select_out_of_range(model, select):
    with kvtier.offload(model, settings(select=10)) as kv:
        book = kv.prefill(BOOK)
        with pytest.raises(ValueError, match=rf"select must be 0 .. 10 \(\[attention\] select\), not {select}"):
            book.fork(select=select)


def chunks(kv):
    return {name: tier["chunks"] for name, tier in kv.stats()["tiers"].items()}


def three_tiers(model, tmp_path, **other):
    config = settings(select=30, **other)
    budget = {name: minimum_budget(model, config, name) for name in ("gpu", "host")}
    return {**config, "budget": {**budget, "disk": "16MiB"}, "store": {"path": str(tmp_path / "store")}}


def test_deleted_caches_give_their_chunks_back(model, tmp_path):
    with kvtier.offload(model, three_tiers(model, tmp_path)) as kv:
        cache = kv.prefill(BOOK)
        assert all(n > 0 for n in chunks(kv).values())
        del cache
        gc.collect()
        assert chunks(kv) == {"device": 0, "host": 0, "disk": 0}


def test_a_fork_keeps_shared_chunks_alive(model):
    with kvtier.offload(model, settings()) as kv:
        book = kv.prefill(BOOK)
        held = chunks(kv)["host"]
        fork = book.fork()
        del book
        gc.collect()
        assert chunks(kv)["host"] == held > 0
        assert new_tokens(model, QUESTION, past_key_values=fork) == stock_tokens()
        del fork
        gc.collect()
        assert chunks(kv)["host"] == 0


def test_a_generate_without_a_cache_keeps_nothing(model):
    with kvtier.offload(model, settings()) as kv:
        model.generate(TEXT, **GREEDY)
        gc.collect()
        assert chunks(kv) == {"device": 0, "host": 0}


def test_many_short_lived_caches_fit_a_budget_of_one(model, tmp_path):
    with kvtier.offload(model, three_tiers(model, tmp_path)) as kv:
        for _ in range(6):
            assert new_tokens(model, TEXT) == stock_tokens()
            gc.collect()
        assert all(tier["bytes"] <= tier["budget"] for tier in kv.stats()["tiers"].values())


# -- statistics -------------------------------------------------------------------------------------------------------


def test_stats_is_a_dict_with_a_readable_str(model, tmp_path):
    with kvtier.offload(model, three_tiers(model, tmp_path)) as kv:
        cache = kv.prefill(BOOK)
        model.generate(QUESTION, past_key_values=cache, **GREEDY)
        stats = kv.stats()
    assert isinstance(stats, dict)
    assert list(stats["tiers"]) == ["device", "host", "disk"]
    for tier in stats["tiers"].values():
        assert tier.keys() == {
            "bytes", "budget", "chunks", "hits", "misses", "hit_rate", "bytes_read", "bytes_written",
        }  # fmt: skip
        assert 0 < tier["bytes"] <= tier["budget"]
    assert stats["prefill"]["computed_tokens"] == 150 + 25
    assert stats["decode"]["steps"] == 19
    assert stats["longest_attended"] == 150 + 25 + 19, "all are attended: every chunk is selected"
    text = str(stats)
    assert all(word in text for word in ("device", "host", "disk", "hit rate", "tokens/s", "steps"))
    assert "150" not in text.split("\n")[0]


def test_stats_count_chunks_and_bytes(model):
    """150 tokens, 4 sinks, local 16: before the last token (149) 16 chunks of 8 tokens have left the window."""
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        tiers = kv.stats()["tiers"]
        assert cache.get_seq_length() == 150
    n = 16 * 2 * 2  # chunks, KV heads, layers
    payload = 2 * 8 * 16 * 4  # K and V, tokens, head_dim, bytes
    assert tiers["host"]["chunks"] == n
    assert tiers["host"]["bytes_written"] == n * payload
    assert tiers["device"]["misses"] == n  # each is fetched once and stays
    assert tiers["host"]["bytes_read"] == n * payload
    assert tiers["host"]["hit_rate"] == 1


def test_stats_outlive_the_block_and_the_caches(model):
    """What was counted stays counted when the last chunk has gone."""
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        before = kv.stats()["tiers"]["host"]
        del cache
        gc.collect()
        after = kv.stats()["tiers"]["host"]
        assert after["chunks"] == 0
        assert before["bytes_written"] == after["bytes_written"] > 0
        assert before["hits"] == after["hits"] > 0
    assert kv.stats()["tiers"]["host"] == after
    assert kv.stats()["prefill"]["computed_tokens"] == 150


def test_stats_before_anything_was_done(model):
    with kvtier.offload(model, settings()) as kv:
        stats = kv.stats()
    assert stats["tiers"]["device"]["hit_rate"] is None
    assert stats["decode"]["tokens_per_s"] is None
    assert "device" in str(stats)


# -- generate ---------------------------------------------------------------------------------------------------------


def test_generate_without_a_cache(model):
    with kvtier.offload(model, settings()):
        assert new_tokens(model, TEXT) == stock_tokens()


def test_generate_by_keyword(model):
    with kvtier.offload(model, settings()):
        assert model.generate(input_ids=TEXT, **GREEDY)[:, 175:].tolist() == stock_tokens()
        assert model.generate(inputs=TEXT, **GREEDY)[:, 175:].tolist() == stock_tokens()


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_generate_with_only_the_new_tokens(model, name):
    with kvtier.offload(model, settings()) as kv:
        out = model.generate(QUESTION, **{name: kv.prefill(BOOK)}, **GREEDY)
        assert out[:, :25].tolist() == QUESTION.tolist()
        assert out[:, 25:].tolist() == stock_tokens()


@pytest.mark.parametrize("length", ["question", "text"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_generate_with_what_a_tokenizer_returns(model, length, dtype):
    """``**tokenizer(question)`` has a mask of the question's length, stock transformers wants the whole length."""
    n = {"question": 25, "text": 175}[length]
    encoded = {"input_ids": QUESTION, "attention_mask": torch.ones(1, n, dtype=dtype)}
    with kvtier.offload(model, settings()) as kv:
        out = model.generate(**encoded, past_key_values=kv.prefill(BOOK), **GREEDY)
        assert out[:, 25:].tolist() == stock_tokens()


@pytest.mark.parametrize("n", [1, 2, 9, 60])
def test_generate_with_new_tokens_of_any_length(model, n):
    question = prompt(n, seed=n)
    with kvtier.offload(model, settings()) as kv:
        actual = new_tokens(model, question, past_key_values=kv.prefill(BOOK))
    assert actual == stock_tokens(20, torch.cat((BOOK, question), 1))


def test_generate_with_more_new_tokens_than_cached(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(QUESTION)
        assert new_tokens(model, BOOK, past_key_values=cache) == stock_tokens(20, torch.cat((QUESTION, BOOK), 1))


def test_generate_with_the_whole_conversation(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        assert new_tokens(model, TEXT, past_key_values=cache) == stock_tokens()
        assert kv.stats()["prefill"]["computed_tokens"] == 175, "cached tokens were computed again"


def test_generate_with_exactly_the_cached_ids(model):
    """All of it is cached: generation goes on from there, and nothing is fed twice but the last token."""
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(TEXT)
        assert new_tokens(model, TEXT, past_key_values=cache) == stock_tokens()
        assert cache.get_seq_length() == 175 + 19


def test_generate_with_exactly_the_cached_ids_of_one_token(model):
    one = prompt(1)
    with kvtier.offload(model, settings()) as kv:
        assert new_tokens(model, one, past_key_values=kv.prefill(one)) == stock_tokens(20, one)


def test_the_last_generated_token_is_not_cached(model):
    """It was never fed to the model. A next turn begins with it, or gives the whole conversation."""
    follow_up = prompt(15, seed=3)
    answer = torch.tensor(stock_tokens())
    expected = stock_tokens(20, torch.cat((TEXT, answer, follow_up), 1))
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        out = model.generate(QUESTION, past_key_values=cache, **GREEDY)
        assert cache.token_ids.tolist() == torch.cat((BOOK, out[:, :-1]), 1)[0].tolist()
        whole, without = cache.fork(), cache.fork()
        assert new_tokens(model, torch.cat((out[:, -1:], follow_up), 1), past_key_values=cache) == expected
        assert new_tokens(model, torch.cat((TEXT, answer, follow_up), 1), past_key_values=whole) == expected
        lost = stock_tokens(20, torch.cat((TEXT, answer[:, :-1], follow_up), 1))
        assert new_tokens(model, follow_up, past_key_values=without) == lost, "a token was fed that was not given"


def test_return_dict_in_generate(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        details = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        out = model.generate(QUESTION, past_key_values=cache, **details, **GREEDY)
        assert cache_of(out) is cache
        assert out.sequences[:, 25:].tolist() == stock_tokens()
        assert len(out.logits) == len(out.scores) == 20
        assert out.logits[0].shape == (1, VOCAB)


def test_a_returned_cache_can_be_used_again(model):
    with kvtier.offload(model, settings()):
        out = model.generate(TEXT, return_dict_in_generate=True, do_sample=False, max_new_tokens=10)
        more = model.generate(out.sequences, past_key_values=cache_of(out), do_sample=False, max_new_tokens=10)
        assert more[:, 175:].tolist() == stock_tokens()


class Recorder:
    """A streamer."""

    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_question_and_each_token(model):
    recorder = Recorder()
    with kvtier.offload(model, settings()) as kv:
        model.generate(QUESTION, past_key_values=kv.prefill(BOOK), streamer=recorder, **GREEDY)
    assert recorder.pieces == [QUESTION[0].tolist(), *([token] for token in stock_tokens()[0])]
    assert recorder.ended


def test_a_logits_processor_sees_ids_and_scores_of_every_step(model):
    lengths = []

    def no_even_tokens(ids, scores):
        lengths.append(ids.shape[1])
        scores = scores.clone()
        scores[:, ::2] = -torch.inf
        return scores

    expected = tiny_llama().generate(TEXT, logits_processor=[no_even_tokens], **GREEDY)[:, 175:].tolist()
    lengths.clear()
    with kvtier.offload(model, settings()) as kv:
        actual = new_tokens(model, QUESTION, past_key_values=kv.prefill(BOOK), logits_processor=[no_even_tokens])
    assert actual == expected != stock_tokens()
    assert lengths == list(range(25, 45))


def test_stopping_criteria(model):
    def after_thirty_tokens(ids, scores):
        return torch.tensor([ids.shape[1] >= 30])

    with kvtier.offload(model, settings()) as kv:
        stop = StoppingCriteriaList([after_thirty_tokens])
        out = model.generate(QUESTION, past_key_values=kv.prefill(BOOK), stopping_criteria=stop, **GREEDY)
    assert out[:, 25:].tolist() == [stock_tokens()[0][:5]]


def test_an_end_token_stops(model):
    answer = stock_tokens()[0]
    end = answer[6]
    with kvtier.offload(model, settings()) as kv:
        out = new_tokens(model, QUESTION, past_key_values=kv.prefill(BOOK), eos_token_id=end)
    assert out == [answer[: answer.index(end) + 1]]


@pytest.mark.parametrize("n", [1, 2])
def test_very_few_new_tokens(model, n):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        assert new_tokens(model, QUESTION, past_key_values=cache, max_new_tokens=n) == [stock_tokens()[0][:n]]
        assert cache.get_seq_length() == 175 + n - 1


def test_a_prompt_with_pad_ids_that_are_real_tokens(model):
    """A mask of ones says so."""
    ids = TEXT.clone()
    ids[0, 40] = 0
    mask = torch.ones_like(ids)
    expected = tiny_llama().generate(ids, attention_mask=mask, **GREEDY)[:, 175:].tolist()
    with kvtier.offload(model, settings()):
        assert new_tokens(model, ids, attention_mask=mask) == expected


@pytest.mark.parametrize("n", [3, 16, 500])
def test_stock_prefill_chunks_are_replaced_by_our_blocks(model, n):
    with kvtier.offload(model, settings()) as kv:
        assert new_tokens(model, QUESTION, past_key_values=kv.prefill(BOOK), prefill_chunk_size=n) == stock_tokens()


def test_positional_arguments_of_stock_generate(model):
    """inputs, generation_config, logits_processor, stopping_criteria."""
    config = GenerationConfig(**GREEDY)
    stop = StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= 180])])
    with kvtier.offload(model, settings()):
        assert model.generate(TEXT, config, None, stop)[:, 175:].tolist() == [stock_tokens()[0][:5]]


# -- model(...) -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 150, 175, 500])
@pytest.mark.parametrize("cached", [0, 150])
def test_logits_to_keep_is_what_stock_keeps(model, keep, cached):
    """0 means all. With a cache: of the new tokens."""
    expected = logits_of(tiny_llama(), TEXT)[:, cached:][:, -keep:]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(TEXT[:, :cached]) if cached else None
        actual = logits_of(model, TEXT[:, cached:], past_key_values=cache, logits_to_keep=keep)
    assert actual.shape == expected.shape
    close(actual, expected)


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_forward_with_a_cache_under_either_name(model, name):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache()
        first = logits_of(model, BOOK, **{name: cache})
        second = logits_of(model, QUESTION, **{name: cache})
        assert cache.get_seq_length() == 175
    close(torch.cat((first, second), 1), logits_of(tiny_llama(), TEXT))


def test_forward_without_a_cache_makes_one(model):
    with kvtier.offload(model, settings()):
        output = model(input_ids=BOOK, attention_mask=torch.ones_like(BOOK), use_cache=True)
        cache = cache_of(output)
        assert isinstance(cache, kvtier.TieredCache)
        assert cache.token_ids.tolist() == BOOK[0].tolist()
        close(logits_of(model, QUESTION, past_key_values=cache), logits_of(tiny_llama(), TEXT)[:, 150:])


def test_forward_as_a_tuple(model):
    with kvtier.offload(model, settings()):
        logits, cache = model(BOOK, return_dict=False)
        assert isinstance(cache, kvtier.TieredCache)
    close(logits, logits_of(tiny_llama(), BOOK))


def test_forward_with_positional_arguments(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        positions = torch.arange(150, 175)[None]
        actual = model(QUESTION, torch.ones(1, 175), positions, cache).logits
    close(actual, logits_of(tiny_llama(), TEXT)[:, 150:])


def test_a_decode_loop_by_hand(model):
    """The usual loop around model(...): one token at a time, always with the cache."""
    ids, answer = QUESTION, []
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        for _ in range(20):
            ids = logits_of(model, ids, past_key_values=cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)
            answer.append(ids.item())
    assert [answer] == stock_tokens()


# -- leaving the block ------------------------------------------------------------------------------------------------


def raise_at(step, error):
    """A logits processor that raises ``error`` at its ``step``-th call."""
    calls = iter(range(1, 1000))

    def process(ids, scores):
        if next(calls) == step:
            raise error
        return scores

    return process


def use(model, kv):
    cache = kv.prefill(BOOK)
    model.generate(QUESTION, past_key_values=cache.fork(), **GREEDY)
    model(QUESTION, past_key_values=cache)
    model.generate(TEXT, **GREEDY)


def assert_like_new(model, before, **made):
    """Attributes as before, and outputs bit-identical to those of a copy that was never in a block."""
    assert_untouched(model, before)
    fresh = tiny_llama(**made)
    assert torch.equal(logits_of(model, TEXT), logits_of(fresh, TEXT))
    assert torch.equal(model.generate(TEXT, **GREEDY), fresh.generate(TEXT, **GREEDY))


@pytest.mark.parametrize("rope", ["default", "dynamic", "yarn"])
def test_leaving_restores_the_model(rope):
    model = tiny_llama(rope=rope)
    before = fingerprint(model)
    with kvtier.offload(model, settings()) as kv:
        use(model, kv)
    assert_like_new(model, before, rope=rope)


def use_and_raise(model, error, step):
    """``error`` comes from the ``step``-th step of a generate in the block, or from the block's own code for 0."""
    with kvtier.offload(model, settings()) as kv:
        use(model, kv)
        if not step:
            raise error
        model.generate(TEXT, logits_processor=[raise_at(step, error)], **GREEDY)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("step", [0, 1, 5], ids=["body", "first step", "later step"])
def test_leaving_by_an_exception_restores_the_model(error, step):
    model, raised = tiny_llama(), error("mine")
    before = fingerprint(model)
    with pytest.raises(error, match="mine") as caught:
        use_and_raise(model, raised, step)
    assert caught.value is raised
    assert_like_new(model, before)


def test_leaving_inside_a_failed_prefill_restores_the_model():
    model = tiny_llama()
    before = fingerprint(model)
    failing = pytest.raises(RuntimeError, match="in the middle")
    with failing, failing_layer(model, at=5), kvtier.offload(model, settings()) as kv:
        kv.prefill(BOOK)
    assert_like_new(model, before)


def test_many_blocks_one_after_the_other(model):
    for _ in range(5):
        with kvtier.offload(model, settings()):
            assert new_tokens(model, TEXT) == stock_tokens()
        assert new_tokens(model, TEXT) == stock_tokens()


def test_an_instance_forward_of_others_is_called_and_put_back():
    """accelerate, for one, puts a forward on the instance."""
    model, calls = tiny_llama(), []
    original = model.forward

    @functools.wraps(original)
    def mine(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = mine
    with kvtier.offload(model, settings()):
        assert new_tokens(model, TEXT) == stock_tokens()
    assert calls
    assert vars(model)["forward"] is mine
    assert "generate" not in vars(model)


def test_hooks_of_the_user_run_inside_the_block():
    model, seen = tiny_llama(), []
    handle = model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(1))
    with kvtier.offload(model, settings()):
        model(BOOK)
    assert len(seen) == len([*range(0, 141, 32)]) + 2  # blocks of 32, the tail, the last token
    handle.remove()


def test_the_store_folder_holds_no_scratch_after_the_block(model, tmp_path):
    with kvtier.offload(model, three_tiers(model, tmp_path)) as kv:
        cache = kv.prefill(BOOK)
        assert cache.get_seq_length() == 150
        assert list((tmp_path / "store").glob("spill-*"))
    assert not list((tmp_path / "store").glob("*-*"))


# -- after an exception -----------------------------------------------------------------------------------------------


class failing_layer:
    """The last layer raises at its ``at``-th call (or at every second call); a context manager."""

    def __init__(self, model, at=None):
        self.layer, self.at, self.calls = model.model.layers[-1], at, 0

    def __enter__(self):
        self.handle = self.layer.register_forward_pre_hook(self.hook)
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def hook(self, module, args):
        self.calls += 1
        if self.calls == self.at or (self.at is None and self.calls % 2):
            raise RuntimeError("in the middle of a forward")


@pytest.mark.parametrize("step", [1, 2, 9])
def test_a_cache_is_usable_after_an_exception_in_generate(model, step):
    """It holds what was fed before, and goes on from there."""
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with pytest.raises(RuntimeError, match="mine"):
            model.generate(
                QUESTION, past_key_values=cache, logits_processor=[raise_at(step, RuntimeError("mine"))], **GREEDY
            )
        fed = torch.tensor([TEXT[0].tolist() + stock_tokens()[0][: step - 1]])
        assert cache.token_ids.tolist() == fed[0].tolist()
        rest = new_tokens(model, fed, past_key_values=cache, max_new_tokens=20 - step + 1)
        assert rest == [stock_tokens()[0][step - 1 :]]


def test_a_cache_is_usable_after_a_failure_in_the_middle_of_a_prefill(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache()
        with failing_layer(model, at=4), pytest.raises(RuntimeError, match="in the middle"):
            model(TEXT, past_key_values=cache)
        assert cache.token_ids.tolist() == TEXT[0, :96].tolist()
        assert new_tokens(model, TEXT, past_key_values=cache) == stock_tokens()


def test_every_step_fails_once_between_its_layers(model):
    """The first layers have retired chunks and written their ring when the last one fails; the retry is exact."""
    expected = logits_of(tiny_llama(), TEXT)[:, 100:]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(TEXT[:, :100])
        steps = []
        with failing_layer(model):
            for token in TEXT[:, 100:].split(1, dim=1):
                with pytest.raises(RuntimeError, match="in the middle"):
                    model(token, past_key_values=cache)
                steps.append(logits_of(model, token, past_key_values=cache))
    close(torch.cat(steps, 1), expected)


def test_forks_made_right_after_a_failed_step_are_exact(model):
    expected = logits_of(tiny_llama(), TEXT)[:, 100:]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(TEXT[:, :100])
        steps = []
        with failing_layer(model):
            for token in TEXT[:, 100:].split(1, dim=1):
                with pytest.raises(RuntimeError, match="in the middle"):
                    model(token, past_key_values=cache)
                fork = cache.fork()
                steps.append(logits_of(model, token, past_key_values=fork))
                with pytest.raises(RuntimeError, match="in the middle"):
                    model(token, past_key_values=cache)
                logits_of(model, token, past_key_values=cache)
    close(torch.cat(steps, 1), expected)


def test_another_cache_is_usable_after_a_failed_one(model):
    with kvtier.offload(model, settings()) as kv:
        good, bad = kv.prefill(BOOK), kv.new_cache()
        with failing_layer(model, at=3), pytest.raises(RuntimeError, match="in the middle"):
            model(TEXT, past_key_values=bad)
        assert new_tokens(model, QUESTION, past_key_values=good) == stock_tokens()


# -- several blocks ---------------------------------------------------------------------------------------------------


SAME = "this model, or one that shares its config object, is inside an offload block already"


def test_a_nested_block_is_refused_and_the_outer_one_goes_on(model):
    with kvtier.offload(model, settings()):
        with pytest.raises(kvtier.UnsupportedError, match=SAME):
            kvtier.offload(model, settings())
        assert new_tokens(model, TEXT) == stock_tokens()


def test_a_block_made_before_another_was_entered_is_refused(model):
    late = kvtier.offload(model, settings())
    with kvtier.offload(model, settings()):
        with pytest.raises(kvtier.UnsupportedError, match=SAME), late:
            pass
        assert new_tokens(model, TEXT) == stock_tokens()


def test_an_open_block_cannot_be_entered_again(model):
    with kvtier.offload(model, settings()) as kv:
        with pytest.raises(kvtier.UnsupportedError, match=SAME), kv:
            pass
        assert new_tokens(model, QUESTION, past_key_values=kv.prefill(BOOK)) == stock_tokens()


def test_a_second_model_on_the_same_config_object_is_refused(model):
    twin = type(model)(model.config).eval()
    assert twin.config is model.config
    with kvtier.offload(model, settings()), pytest.raises(kvtier.UnsupportedError, match=SAME):
        kvtier.offload(twin, settings())


def test_two_models_in_two_blocks_at_the_same_time():
    first, second = tiny_llama(), tiny_llama(seed=1, heads=8, kv_heads=1, head_dim=32, rope="yarn")
    before = fingerprint(first), fingerprint(second)
    other = tiny_llama(seed=1, heads=8, kv_heads=1, head_dim=32, rope="yarn").generate(TEXT, **GREEDY)[:, 175:].tolist()
    with kvtier.offload(first, settings()) as a, kvtier.offload(second, settings()) as b:
        books = a.prefill(BOOK), b.prefill(BOOK)
        assert new_tokens(first, QUESTION, past_key_values=books[0]) == stock_tokens()
        assert new_tokens(second, QUESTION, past_key_values=books[1]) == other
        with pytest.raises(kvtier.UnsupportedError, match="another offload block"):
            first.generate(QUESTION, past_key_values=books[1], **GREEDY)
    assert_untouched(first, before[0])
    assert_untouched(second, before[1])


def test_blocks_left_in_the_order_they_were_entered():
    first, second = tiny_llama(), tiny_llama(seed=1)
    before = fingerprint(first), fingerprint(second)
    a, b = kvtier.offload(first, settings()), kvtier.offload(second, settings())
    a.__enter__()
    b.__enter__()
    a.__exit__(None, None, None)
    assert new_tokens(first, TEXT) == stock_tokens()
    assert b.prefill(BOOK).get_seq_length() == 150
    b.__exit__(None, None, None)
    assert_untouched(first, before[0])
    assert_untouched(second, before[1])


def test_a_copy_of_the_model_is_free_while_the_original_is_in_a_block(model):
    copied = copy.deepcopy(model)
    with kvtier.offload(model, settings()):
        assert torch.equal(logits_of(copied, TEXT), logits_of(tiny_llama(), TEXT))


# -- outside of the block ---------------------------------------------------------------------------------------------


CLOSED = "offload block"
NOT_OPEN = r"this offload block is not open: use it as `with kvtier\.offload\(model, config\) as kv:`"


@pytest.fixture
def left_over(model):
    """A cache of a block that was left."""
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
    return cache


def test_generate_on_a_cache_after_its_block(model, left_over):
    with pytest.raises(kvtier.KvtierError, match=CLOSED):
        model.generate(QUESTION, **{CACHE_NAME: left_over}, attention_mask=torch.ones(1, 175), **GREEDY)


@pytest.mark.parametrize("ids", [QUESTION, prompt(1), TEXT], ids=["question", "token", "text"])
def test_forward_on_a_cache_after_its_block(model, left_over, ids):
    with pytest.raises(kvtier.KvtierError, match=CLOSED):
        model(ids, **{CACHE_NAME: left_over})


def test_fork_after_the_block(left_over):
    with pytest.raises(kvtier.KvtierError, match=NOT_OPEN):
        left_over.fork()


def test_a_cache_in_the_next_block_of_the_same_model(model, left_over):
    with kvtier.offload(model, settings()), pytest.raises(kvtier.UnsupportedError, match="another offload block"):
        model.generate(QUESTION, past_key_values=left_over, **GREEDY)


def test_deleting_a_cache_after_its_block_is_quiet(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del cache, kv
        gc.collect()


@pytest.mark.parametrize("call", ["prefill", "new_cache"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_block_that_is_not_open(model, when, call):
    kv = kvtier.offload(model, settings())
    if when == "after":
        with kv:
            pass
    with pytest.raises(kvtier.KvtierError, match=NOT_OPEN):
        kv.prefill(BOOK) if call == "prefill" else kv.new_cache()


def test_stats_of_a_block_that_was_never_entered(model):
    """An error that says so, not an AttributeError."""
    with pytest.raises(kvtier.KvtierError, match="not open"):
        kvtier.offload(model, settings()).stats()


def test_entering_a_block_twice_one_after_the_other(model):
    """Works, or is refused; nothing in between."""
    kv = kvtier.offload(model, settings())
    with kv:
        first = new_tokens(model, TEXT)
    try:
        with kv:
            second = new_tokens(model, TEXT)
            assert kv.stats()["tiers"]["host"]["bytes"] <= 2**23
    except kvtier.KvtierError:
        return
    assert first == second == stock_tokens()


def test_a_block_that_has_ended_holds_no_tensors(model):
    """``kv`` and the caches are often still in scope: what they held must be gone all the same."""
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        fork = cache.fork()
        engine, sequences = kv._runtime.engine, [c._lane.sequences[0] for c in (cache, fork)]
        held = [weakref.ref(engine._seats), weakref.ref(sequences[0].layers[0].codes)]
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert all(not s.layers and s.parked is None for s in sequences)
    assert kv._runtime._gpu.used_bytes <= kv._runtime._sizes.fixed
    assert repr(cache) == "TieredCache(closed)"
