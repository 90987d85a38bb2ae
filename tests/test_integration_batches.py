"""Batches: a row of a batch gives what the row alone gives; pads and tokens after a row's end are never stored."""

import functools

import pytest
import torch
from models import assert_untouched, fingerprint, minimum_budget, settings
from rows import (
    CASES,
    DETAILS,
    FEW,
    GREEDY,
    WORDS,
    alone,
    assert_rows_as_alone,
    chosen,
    close,
    fed_blocks,
    generate,
    lists,
    model_of,
    padded,
    pristine,
    stored,
    texts,
    tokenizer,
)
from transformers import StoppingCriteriaList

import kvtier

SINK, LOCAL = 4, 16
LENGTHS = (1, 2, 3, SINK, 5, LOCAL, 21, 28, 60, 130)
"""Around sinks, the window and the first chunk; in the longest, 13 chunks are chosen from at the end, 3 are taken."""


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def model():
    shared = model_of("llama")
    before = fingerprint(shared)
    yield shared
    assert_untouched(shared, before)


# -- a row of a batch is the row alone --------------------------------------------------------------------------------


def test_rows_of_many_lengths_as_alone(case):
    family, config = case
    model, rows = model_of(family), texts(*LENGTHS)
    with kvtier.offload(model, config) as kv:
        cache = kv.new_cache(rows=len(rows))
        tokens, logits = generate(model, rows, past_key_values=cache)
        fed = [row.tolist() + got[:-1].tolist() for row, got in zip(rows, tokens, strict=True)]
        assert stored(cache) == [cache.row(i).token_ids.tolist() for i in range(len(rows))] == fed
        assert [cache.row(i).get_seq_length() for i in range(len(rows))] == [n + 11 for n in LENGTHS]
    assert_rows_as_alone(family, config, rows, tokens, logits)


def test_the_comparison_can_fail(case):
    """Chunks are chosen: with all of them the logits are others. Other rows and pads would show."""
    family, config = case
    row = texts(*LENGTHS)[-1]
    every = settings(local=400, select=1, attention=config["attention"] | {"local": 400, "select": 1})
    assert not torch.allclose(alone(family, config, row)[1], alone(family, every, row)[1], atol=1e-3)
    with kvtier.offload(model_of("llama"), FEW) as kv:
        kv.prefill(row)
        assert chosen(kv) == 3 < kv.geometry.selectable(129)


def test_logits_of_all_tokens_of_a_batch_as_alone(case):
    family, config = case
    model, rows = model_of(family), texts(*LENGTHS)
    ids, mask = padded(rows)
    with kvtier.offload(model, config):
        batch = model(ids, attention_mask=mask).logits
        for row, got, real in zip(rows, batch, mask.bool(), strict=True):
            close(got[real], model(row[None]).logits[0])
            assert not got[~real].any(), "logits at pads are zeros"


@pytest.mark.parametrize("extra", [1, 40])
@pytest.mark.parametrize("lengths", [(1,), (3,), (90,), (90, 7)], ids=str)
def test_columns_of_pads_change_nothing(case, lengths, extra):
    family, config = case
    model, rows = model_of(family), texts(*lengths)
    with kvtier.offload(model, config) as kv:
        cache = kv.new_cache(rows=len(rows))
        tokens, logits = generate(model, rows, extra=extra, past_key_values=cache)
        assert [len(row) for row in stored(cache)] == [n + 11 for n in lengths]
        assert cache.get_seq_length() == max(lengths) + extra + 11, "transformers counts pads"
    assert_rows_as_alone(family, config, rows, tokens, logits)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool], ids=str)
def test_what_stands_in_the_place_of_pads_does_not_matter(model, dtype):
    rows = texts(40, 9)
    ids, mask = padded(rows, extra=2, pad=77)
    with kvtier.offload(model, FEW) as kv:
        cache = kv.prefill(ids, attention_mask=mask.to(dtype))
        assert stored(cache) == lists(rows)
        out = model.generate(ids, attention_mask=mask.to(dtype), past_key_values=cache, **GREEDY)
        assert out[:, : ids.shape[1]].tolist() == ids.tolist(), "the ids come back as they were given"
    for row, got in zip(rows, out[:, ids.shape[1] :], strict=True):
        assert got.tolist() == alone("llama", FEW, row)[0].tolist()


def test_many_rows(model):
    rows = texts(*[1 + 7 * i % 61 for i in range(24)])
    with kvtier.offload(model, FEW) as kv:
        cache = kv.new_cache(rows=24)
        tokens, logits = generate(model, rows, 4, past_key_values=cache)
        assert [len(row) for row in stored(cache)] == [len(row) + 3 for row in rows]
    for row, got, scores in zip(rows, tokens, logits, strict=True):
        expected = alone("llama", FEW, row)
        assert got.tolist() == expected[0][:4].tolist()
        close(scores, expected[1][:4])


def test_equal_rows_are_equal(model):
    row = texts(80)[0]
    with kvtier.offload(model, FEW):
        tokens, logits = generate(model, [row, row, row])
    assert tokens[0].tolist() == tokens[1].tolist() == tokens[2].tolist()
    close(logits[1], logits[0])
    close(logits[2], logits[0])


def test_decode_steps_run_all_rows_in_one_forward(model):
    """Blocks row by row, then the last tokens of all rows together; a batch of one token a row is one forward."""
    rows = texts(50, 1, 10)
    with kvtier.offload(model, FEW) as kv:
        shapes = fed_blocks(kv)
        generate(model, rows, 3)
        stats = kv.stats()
    assert shapes == [(1, 32), (1, 9), (1, 8), (1, 1), (1, 8), *3 * [(3, 1)]]
    assert (stats["prefill"]["computed_tokens"], stats["decode"]["steps"]) == (61, 2)
    assert stats["longest_attended"] <= FEW["attention"]["select"] * 8 + SINK + 32 + LOCAL + 7


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batches_equal_stock_ones_within_the_window(family):
    ids, mask = padded(texts(100, 45, 1))
    expected = pristine(family).generate(ids, attention_mask=mask, **GREEDY, **DETAILS)
    with kvtier.offload(model_of(family), settings()):
        out = model_of(family).generate(ids, attention_mask=mask, **GREEDY, **DETAILS)
    assert out.sequences.tolist() == expected.sequences.tolist()
    close(torch.stack(out.logits), torch.stack(expected.logits), 1e-4)


def test_rows_in_three_tiers(model, tmp_path):
    """Chunks of all rows share the pool, the host and the disk."""
    budget = {name: minimum_budget(model, FEW, name) for name in ("gpu", "host")}
    budget = {"gpu": 3 * budget["gpu"], "host": budget["host"], "disk": "16MiB"}
    config = {**FEW, "budget": budget, "store": {"path": str(tmp_path / "store")}}
    rows = texts(130, 60, 90)
    with kvtier.offload(model, config) as kv:
        cache = kv.new_cache(rows=3)
        tokens, logits = generate(model, rows, past_key_values=cache)
        tiers = kv.stats()["tiers"]
        assert cache.n_rows == 3
    assert all(tier["chunks"] > 0 for tier in tiers.values())
    assert_rows_as_alone("llama", FEW, rows, tokens, logits)


# -- rows that end ----------------------------------------------------------------------------------------------------


ENDING = texts(70, 30, 5, 1)
VARIED = GREEDY | {"no_repeat_ngram_size": 1}
"""Greedy, and no token twice: tiny models say one thing again and again."""


@functools.cache
def endless():
    """Stock's greedy continuations [4, 12] of the rows, if nothing ends them."""
    ids, mask = padded(ENDING)
    return pristine("llama").generate(ids, attention_mask=mask, **VARIED)[:, ids.shape[1] :]


def ends_at(*steps):
    """End tokens that end rows 0, 1, .. at the latest at these steps."""
    return [endless()[row, step].item() for row, step in enumerate(steps)]


def ended_after(answer, ends):
    """How many tokens of an answer come before its end, or before its last token if nothing ends it."""
    return next((i for i, token in enumerate(answer) if token in ends), len(answer) - 1)


def end_like_stock(model, ends, **arguments):
    """Stock's sequences, and each row stores what came before its end; returns the number of tokens of each answer."""
    ids, mask = padded(ENDING)
    options = VARIED | arguments
    expected = pristine("llama").generate(ids, attention_mask=mask, **options)
    with kvtier.offload(model, settings()) as kv:
        cache, shapes = kv.new_cache(rows=4), fed_blocks(kv)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert out.tolist() == expected.tolist()
        counts = [ended_after(row.tolist(), ends) for row in out[:, ids.shape[1] :]]
        answers = [row[:n].tolist() for row, n in zip(endless(), counts, strict=True)]
        assert stored(cache) == [row.tolist() + a for row, a in zip(ENDING, answers, strict=True)]
        steps = [n for n, length in shapes if length == 1][1:]  # without the last tokens of the prompts
        assert steps == [sum(n > step for n in counts) for step in range(max(counts))], "a row that has ended was fed"
        assert not cache._lane.ended
    return counts


def test_end_tokens_end_rows_one_by_one(model):
    ends = ends_at(9, 3)
    counts = end_like_stock(model, ends, eos_token_id=ends)
    assert len(set(counts)) > 2


def test_a_single_end_token(model):
    (end,) = ends_at(4)
    assert min(end_like_stock(model, [end], eos_token_id=end)) < 5


def test_all_rows_end_at_once(model):
    ends = sorted(set(endless()[:, 2].tolist()))
    counts = end_like_stock(model, ends, eos_token_id=ends)
    assert max(counts) <= 2
    ends = sorted(set(endless()[:, 0].tolist()))
    assert end_like_stock(model, ends, eos_token_id=ends) == [0, 0, 0, 0]


def test_a_custom_criterion_ends_rows(model):
    """With an end token stock pads rows that a criterion has ended; kvtier does not feed them."""

    def after(ids, scores):
        return torch.isin(ids[:, -1], torch.tensor(ends)) & (ids.shape[1] > 70)

    ends, never = ends_at(7, 3), next(t for t in range(1, WORDS) if t not in endless())
    end_like_stock(model, ends, eos_token_id=never, stopping_criteria=StoppingCriteriaList([after]))
    end_like_stock(
        model, ends, eos_token_id=never, stopping_criteria=[after, lambda ids, scores: torch.zeros(4).bool()]
    )


def test_stop_strings_end_rows(model):
    ends, never = ends_at(6, 2), next(t for t in range(1, WORDS) if t not in endless())
    words = tokenizer()
    strings = words.convert_ids_to_tokens(ends)
    assert all(string.startswith("w") for string in strings)
    end_like_stock(model, ends, eos_token_id=never, stop_strings=strings, tokenizer=words)


def test_without_an_end_token_rows_go_on_until_all_have_ended(model):
    """As in stock generate, which has nothing to pad with."""

    def short(ids, scores):
        return torch.tensor([True, ids.shape[1] >= 75, True, ids.shape[1] >= 73])

    ids, mask = padded(ENDING)
    options = VARIED | {"stopping_criteria": [short]}
    expected = pristine("llama").generate(ids, attention_mask=mask, **options)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows=4)
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        assert out.tolist() == expected.tolist()
        assert out.shape[1] == 75
        assert [len(row) for row in stored(cache)] == [len(row) + 4 for row in ENDING]


def test_a_next_turn_on_rows_that_had_ended(model):
    """Each row goes on from its own end: its last token, never fed, and the question, padded on the left."""
    ends, questions = ends_at(9, 3), texts(12, 3, 40, 1, seed=80)
    ids, mask = padded(ENDING)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows=4)
        model.generate(ids, attention_mask=mask, past_key_values=cache, eos_token_id=ends, **VARIED)
        counts = [len(s) - len(row) for s, row in zip(stored(cache), ENDING, strict=True)]
        rest = [torch.cat((a[n : n + 1], q)) for a, n, q in zip(endless(), counts, questions, strict=True)]
        tokens, logits = generate(model, rest, past_key_values=cache)
    for row, answer, n, q, got, scores in zip(ENDING, endless(), counts, questions, tokens, logits, strict=True):
        whole = torch.cat((row, answer[: n + 1], q))
        out = pristine("llama").generate(whole[None], attention_mask=torch.ones(1, len(whole)), **GREEDY, **DETAILS)
        assert got.tolist() == out.sequences[0, len(whole) :].tolist()
        close(scores, torch.cat(out.logits), 1e-4)
