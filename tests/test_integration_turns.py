"""Several turns on a batch: new tokens, whole conversations, rewinding, exceptions in between, refusals."""

import pytest
import torch
from models import PAD, assert_untouched, fingerprint, prompt, settings
from rows import (
    CASES,
    FEW,
    GREEDY,
    alone,
    assert_rows_as_alone,
    close,
    failing,
    forward,
    generate,
    held,
    last,
    lists,
    model_of,
    padded,
    stock_logits,
    stored,
    texts,
)

import kvtier


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture
def model():
    shared = model_of("llama")
    before = fingerprint(shared)
    yield shared
    assert_untouched(shared, before)


def prefill(kv, rows):
    ids, mask = padded(rows)
    return kv.prefill(ids, attention_mask=mask)


# -- turns ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["forward", "generate"])
def test_turns_on_a_batch_as_alone(case, how):
    """New tokens padded on the left, three times, on rows of different lengths; then the same turns for each row."""
    family, config = case
    model, turns = model_of(family), [texts(100, 1, 30), texts(1, 50, 9, seed=60), texts(20, 2, 1, seed=70)]
    with kvtier.offload(model, config) as kv:
        batch, singles = kv.new_cache(rows=3), [kv.new_cache() for _ in range(3)]
        for turn in turns:
            if how == "forward":
                got = forward(model, turn, batch)
                want = [forward(model, [row], c)[0] for row, c in zip(turn, singles, strict=True)]
            else:
                got = list(generate(model, turn, 5, past_key_values=batch)[1])
                want = [generate(model, [r], 5, past_key_values=c)[1][0] for r, c in zip(turn, singles, strict=True)]
            for a, b in zip(got, want, strict=True):
                close(a, b)
        assert stored(batch) == [stored(single)[0] for single in singles]


@pytest.mark.parametrize("extra", [0, 7])
def test_the_whole_conversation_of_a_batch(model, extra):
    """Rows that begin with all that is cached, padded as before or more: only the rest is read."""
    rows, more = texts(60, 20, 1), texts(9, 9, 9, seed=90)
    whole = [torch.cat(pair) for pair in zip(rows, more, strict=True)]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(*padded(rows)[:1], attention_mask=padded(rows)[1])
        tokens, logits = generate(model, whole, extra=extra, past_key_values=cache)
        assert kv.stats()["prefill"]["computed_tokens"] == 60 + 20 + 1 + 27
        assert stored(cache) == [w.tolist() + t[:-1].tolist() for w, t in zip(whole, tokens, strict=True)]
    for row, scores in zip(whole, logits, strict=True):
        close(scores[0], stock_logits("llama", row)[-1], 1e-4)


def test_exactly_the_cached_rows_go_on_from_there(case):
    family, config = case
    rows = texts(90, 20, 1)
    ids, mask = padded(rows)
    with kvtier.offload(model_of(family), config) as kv:
        cache = kv.prefill(ids, attention_mask=mask)
        tokens, logits = generate(model_of(family), rows, past_key_values=cache)
        assert [len(row) for row in stored(cache)] == [101, 31, 12]
    assert_rows_as_alone(family, config, rows, tokens, logits)


def test_rows_that_go_on_with_different_numbers_of_tokens_are_refused(model):
    rows = texts(60, 20)
    longer = [torch.cat((row, more)) for row, more in zip(rows, texts(5, 9, seed=90), strict=True)]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(padded(rows)[0], attention_mask=padded(rows)[1])
        with pytest.raises(
            kvtier.UnsupportedError, match=r"different numbers of tokens \(\[5, 9\]\): pass only the new"
        ):
            generate(model, longer, past_key_values=cache)
        assert stored(cache) == lists(rows)
        logits = generate(model, [row[-n:] for row, n in zip(longer, (5, 9), strict=True)], past_key_values=cache)[1]
    for row, scores in zip(longer, logits, strict=True):
        close(scores[0], stock_logits("llama", row)[-1], 1e-4)


def test_new_tokens_that_begin_like_one_cached_row_are_new_tokens(model):
    """All rows must begin with what is cached, or it is not the conversation."""
    rows = texts(5, 5)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(torch.stack(rows))
        swapped = torch.stack((rows[0], prompt(5, seed=3)[0]))
        model.generate(swapped, past_key_values=cache, **GREEDY)
        assert [row[:10] for row in stored(cache)] == [
            a.tolist() + b.tolist() for a, b in zip(rows, swapped, strict=True)
        ]


BAD_MASKS = {
    "right padding": ([[1, 1, 1], [1, 1, 0]], r"zeros after tokens in row 1: right padding and gaps"),
    "a gap": ([[1, 0, 1], [1, 1, 1]], r"zeros after tokens in row 0: right padding and gaps"),
    "a row of pads": ([[1, 1, 1], [0, 0, 0]], r"row 1 of attention_mask is all pads"),
    "one row": ([[1, 1, 1]], r"attention_mask must be 2-D with 2 rows"),
    "too short": ([[1, 1], [1, 1]], r"attention_mask has 2 columns for 3 tokens on 30 cached ones"),
    "too long": ([[1] * 34] * 2, r"attention_mask has 34 columns for 3 tokens on 30 cached ones"),
}


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("name", BAD_MASKS)
def test_a_mask_that_is_refused_leaves_the_rows_as_they_were(model, name, call):
    rows, (mask, message) = texts(30, 11), BAD_MASKS[name]
    more = torch.stack(texts(3, 3, seed=90))
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(padded(rows)[0], attention_mask=padded(rows)[1])
        with pytest.raises(kvtier.UnsupportedError, match=message):
            getattr(model, call)(more, attention_mask=torch.tensor(mask), past_key_values=cache)
        assert stored(cache) == lists(rows)
        assert cache.get_seq_length() == 30
        got = forward(model, list(more), cache)
    for row, new, scores in zip(rows, more, got, strict=True):
        close(scores, stock_logits("llama", torch.cat((row, new)))[-3:], 1e-4)


def test_pads_without_a_mask_are_refused(model):
    ids, _ = padded(texts(9, 3))
    with kvtier.offload(model, FEW), pytest.raises(kvtier.UnsupportedError, match=f"the pad token {PAD} and no att"):
        model.generate(ids, **GREEDY)


def test_a_mask_of_all_columns_on_a_batch_with_pads(model):
    """What a user makes by concatenating masks, turn after turn."""
    rows, more = texts(40, 9), texts(6, 2, seed=90)
    (ids, mask), (new, new_mask) = padded(rows), padded(more)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows=2)
        model(ids, attention_mask=mask, past_key_values=cache)
        logits = model(new, attention_mask=torch.cat((mask, new_mask), 1), past_key_values=cache).logits[:, -1]
        assert stored(cache) == [a.tolist() + b.tolist() for a, b in zip(rows, more, strict=True)]
    for row, b, scores in zip(rows, more, logits, strict=True):
        close(scores, stock_logits("llama", torch.cat((row, b)))[-1], 1e-4)


# -- rewinding --------------------------------------------------------------------------------------------------------


def test_rewinding_a_batch_gives_the_last_logits_again(case):
    """Also when its rows have been parked in between."""
    family, config = case
    rows = texts(100, 37, 1)
    with kvtier.offload(model_of(family), config) as kv:
        cache = prefill(kv, rows)
        logits = last(forward(model_of(family), texts(1, 1, 1, seed=90), cache))
        kv.prefill(prompt(40))
        cache.rewind()
        assert stored(cache) == lists(rows)
        close(last(forward(model_of(family), texts(1, 1, 1, seed=90), cache)), logits)


def test_rewinding_needs_a_last_block_of_one_token_in_every_row(model):
    rows = texts(50, 20)
    with kvtier.offload(model, FEW) as kv:
        cache = prefill(kv, rows)
        cache.rewind()
        with pytest.raises(kvtier.UnsupportedError, match="was longer than a token"):
            cache.rewind()
        assert stored(cache) == [row[:-1].tolist() for row in rows]


def test_a_batch_of_which_one_row_cannot_be_rewound_is_left_as_it_was(model):
    rows = texts(50, 20)
    with kvtier.offload(model, FEW) as kv:
        cache = prefill(kv, rows)
        with failing(model, 2), pytest.raises(RuntimeError, match="in the middle"):
            forward(model, texts(9, 9, seed=90), cache)
        before = stored(cache)
        assert [len(row) for row in before] == [58, 20]
        with pytest.raises(kvtier.UnsupportedError, match="was longer than a token"):
            cache.rewind()
        assert stored(cache) == before


def test_a_generate_that_fails_after_all_was_cached_changes_nothing(model):
    """Exactly the cached ids: their last token is fed again, and must not be lost when nothing is fed."""
    rows = texts(60, 20)

    with kvtier.offload(model, settings()) as kv:
        cache = prefill(kv, rows)
        with pytest.raises(ValueError, match="not_an_argument"):
            generate(model, rows, past_key_values=cache, not_an_argument=1)
        assert stored(cache) == lists(rows)
        with failing(model, 1), pytest.raises(RuntimeError, match="in the middle"):
            generate(model, rows, past_key_values=cache)
        assert stored(cache) == lists(rows)
        logits = last(forward(model, texts(1, 1, seed=90), cache))
    for row, new, scores in zip(rows, texts(1, 1, seed=90), logits, strict=True):
        close(scores, stock_logits("llama", torch.cat((row, new)))[-1], 1e-4)


# -- exceptions -------------------------------------------------------------------------------------------------------


ROWS = texts(100, 70, 1, 40)
"""Blocks of the rows: 4, 3, 0 and 2; then the last tokens of all rows together."""
N_BLOCKS = 9


def go_on(model, cache, rows):
    """Feed what each row still lacks, padded on the left; the last logits."""
    rest = [row[len(got) :] for row, got in zip(rows, stored(cache), strict=True)]
    return last(forward(model, rest, cache))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("at", [1, 3, 5, 7, 9, N_BLOCKS + 1])
def test_a_batch_is_usable_after_an_exception_in_the_middle(family, layer, at):
    """Rows before the one that failed have all but their last token, none has a part of a block or a pad."""
    model = model_of(family)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows=4)
        with failing(model, at, layer=layer), pytest.raises(RuntimeError, match="in the middle"):
            forward(model, ROWS, cache)
        done = [len(row) for row in stored(cache)]
        assert stored(cache) == [row[:n].tolist() for row, n in zip(ROWS, done, strict=True)]
        assert done[0] == 99 if at > 4 else done[1:] == [0, 0, 0]
        logits = go_on(model, cache, ROWS)
        assert stored(cache) == lists(ROWS)
        more = texts(9, 1, 30, 2, seed=90)
        after = last(forward(model, more, cache))
    for row, new, scores, then in zip(ROWS, more, logits, after, strict=True):
        close(scores, stock_logits(family, row)[-1], 1e-4)
        close(then, stock_logits(family, torch.cat((row, new)))[-1], 1e-4)


@pytest.mark.parametrize("at", [1, 2, 6])
def test_a_step_of_a_batch_that_failed_can_be_repeated(case, at):
    """One row's attention has been computed, the next one's fails: no row has taken the step."""
    family, config = case
    rows = texts(90, 45)
    with kvtier.offload(model_of(family), config) as kv:
        cache = kv.new_cache(rows=2)
        engine = kv._runtime.engine
        prefix = last(forward(model_of(family), rows, cache))
        attend, calls = engine.attend, []

        def fail_once(*args):
            calls.append(1)
            if len(calls) == 2 * at:
                raise MemoryError("row 1")
            return attend(*args)

        tokens, logits = [prefix.argmax(-1)], [prefix]
        engine.attend = fail_once
        failures = 0
        while len(logits) < 12:
            try:
                logits.append(last(forward(model_of(family), list(tokens[-1][:, None]), cache)))
            except MemoryError:
                failures += 1
                continue
            tokens.append(logits[-1].argmax(-1))
        del engine.attend
        assert failures == 1
    assert_rows_as_alone(family, config, rows, torch.stack(tokens, 1), torch.stack(logits, 1))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_batch_is_usable_after_an_exception_in_generate(model, error, step):
    rows, seen = texts(80, 33), []

    def fail(ids, scores):
        seen.append(ids)
        if len(seen) == step:
            raise error("mine")
        return scores

    with kvtier.offload(model, FEW) as kv:
        cache = kv.new_cache(rows=2)
        with pytest.raises(error, match="mine"):
            generate(model, rows, past_key_values=cache, logits_processor=[fail])
        assert stored(cache) == [row.tolist() + ids[80:].tolist() for row, ids in zip(rows, seen[-1], strict=True)]
        whole = [torch.tensor(row) for row in stored(cache)]
        tokens, logits = generate(model, whole, 12 - step + 1, past_key_values=cache)
    for row, got, scores in zip(rows, tokens, logits, strict=True):
        expected = alone("llama", FEW, row)
        assert got.tolist() == expected[0][step - 1 :].tolist()
        close(scores, expected[1][step - 1 :])


def test_failed_calls_count_no_pads(model):
    """What transformers takes for the length of the cache is that of the calls that went through."""
    rows, more = texts(40, 9), texts(6, 2, seed=90)
    (ids, mask), (new, new_mask) = padded(rows), padded(more)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows=2)
        for _ in range(3):
            with failing(model, 1), pytest.raises(RuntimeError, match="in the middle"):
                model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 40
        logits = model(new, attention_mask=torch.cat((mask, new_mask), 1), past_key_values=cache).logits[:, -1]
    for row, b, scores in zip(rows, more, logits, strict=True):
        close(scores, stock_logits("llama", torch.cat((row, b)))[-1], 1e-4)


def test_a_conversation_that_was_read_in_part_is_not_read_twice(model):
    """After a failure rows hold different parts of it, some nothing; the whole is then refused, the rest is served."""
    rows = texts(40, 20)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows=2)
        with failing(model, 3), pytest.raises(RuntimeError, match="in the middle"):
            forward(model, rows, cache)
        assert [len(row) for row in stored(cache)] == [39, 0]
        with pytest.raises(kvtier.UnsupportedError, match=r"different numbers of tokens \(\[1, 20\]\)"):
            generate(model, rows, past_key_values=cache)
        logits = go_on(model, cache, rows)
    for row, scores in zip(rows, logits, strict=True):
        close(scores, stock_logits("llama", row)[-1], 1e-4)


def test_refused_batches_leave_nothing_behind(model):
    with kvtier.offload(model, FEW) as kv:
        before = held(kv)
        for arguments in ({"num_beams": 2}, {"use_cache": False}, {"position_ids": torch.zeros(2, 30)}):
            with pytest.raises(kvtier.UnsupportedError):
                generate(model, texts(30, 20), **arguments)
        with pytest.raises(ValueError, match="select must be"):
            kv.prefill(torch.stack(texts(30, 30)), select=99)
        with pytest.raises(ValueError, match="at least one row, not 0"):
            kv.new_cache(rows=0)
        assert held(kv) == before
        tokens, logits = generate(model, texts(30, 20))
    assert_rows_as_alone("llama", FEW, texts(30, 20), tokens, logits)
