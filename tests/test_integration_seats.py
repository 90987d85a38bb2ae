"""Forks of batches, their rows, batches and single caches in turns, budgets too small for them, deletion."""

import gc
import itertools
import re

import pytest
import torch
from models import assert_untouched, fingerprint, minimum_budget, prompt, settings
from rows import (
    CASES,
    FEW,
    alone,
    assert_rows_as_alone,
    close,
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
    window_bytes,
)

import kvtier
from kvtier.runtime import host_pool
from kvtier.runtime.window import Windows

BOOK = texts(120)[0]
TOKENS = texts(*[6] * 12, seed=200)
"""What sequences that take turns read, token by token."""


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


# -- forks ------------------------------------------------------------------------------------------------------------


def test_forks_of_a_batch_and_of_its_forks_go_their_own_way(case):
    family, config = case
    model, rows, turns = model_of(family), texts(90, 33), [texts(9, 1, seed=s) for s in (60, 70, 80, 90)]
    with kvtier.offload(model, config) as kv:
        batch = prefill(kv, rows)
        fork = batch.fork()
        third = fork.fork()
        caches = [third, batch, fork, batch.fork()]
        got = [generate(model, turn, 5, past_key_values=cache) for turn, cache in zip(turns, caches, strict=True)]
        assert [row[:9] for row in stored(caches[0])] == [row[:9].tolist() for row in rows]
    with kvtier.offload(model, config) as kv:
        for turn, (tokens, logits) in zip(turns, got, strict=True):
            for i, row in enumerate(rows):
                expected = generate(model, [turn[i]], 5, past_key_values=kv.prefill(row))
                assert tokens[i].tolist() == expected[0][0].tolist()
                close(logits[i], expected[1][0])


def test_many_questions_to_one_book_at_once(case):
    family, config = case
    model, questions = model_of(family), texts(20, 1, 7, seed=60)
    with kvtier.offload(model, config) as kv:
        book = kv.prefill(BOOK)
        chunks = held(kv)[0]["host"][1]
        batch = book.fork(rows=3)
        assert held(kv)[0]["host"][1] == chunks, "chunks are shared"
        assert (batch.n_rows, book.n_rows) == (3, 1)
        tokens, logits = generate(model, questions, past_key_values=batch)
        assert stored(book) == [BOOK.tolist()]
        for question, got, scores in zip(questions, tokens, logits, strict=True):
            expected = generate(model, [question], past_key_values=book.fork())
            assert got.tolist() == expected[0][0].tolist()
            close(scores, expected[1][0])


def test_a_row_of_a_batch_goes_on_alone(case):
    """Its pads stay behind: it is a cache like that of the row alone."""
    family, config = case
    model, rows = model_of(family), texts(100, 50, 2)
    with kvtier.offload(model, config) as kv:
        batch = prefill(kv, rows)
        for i, row in enumerate(rows):
            single = batch.row(i)
            assert single.token_ids.tolist() == row.tolist()
            assert single.get_seq_length() == len(row)
            assert repr(single) == f"TieredCache({len(row)} tokens)"
            mask = torch.ones(1, len(row) + 3)
            new = texts(3, seed=60)[0][None]
            logits = model(new, attention_mask=mask, past_key_values=single).logits[0]
            close(logits, forward(model, [new[0]], kv.prefill(row))[0])
        assert stored(batch) == lists(rows)
        assert stored(batch.row(-1)) == [rows[-1].tolist()]
        with pytest.raises(IndexError):
            batch.row(3)


def test_forks_that_are_refused(model):
    with kvtier.offload(model, FEW) as kv:
        batch = prefill(kv, texts(60, 20))
        before = held(kv)
        for rows, cache in ((0, batch.row(0)), (-1, batch.row(0)), (2, batch), (1, batch)):
            with pytest.raises(
                kvtier.UnsupportedError, match=rf"fork\(rows={rows}\) of a cache of {cache.n_rows} rows"
            ):
                cache.fork(rows=rows)
        with pytest.raises(kvtier.UnsupportedError, match=r"this cache has 2 rows: use cache.row\(i\).token_ids"):
            _ = batch.token_ids
        with pytest.raises(ValueError, match=r"select must be 0 \.\. 3"):
            batch.fork(select=4)
        del cache
        gc.collect()
        assert held(kv)[0]["device"] == before[0]["device"]


def test_a_fork_of_a_rewound_cache_is_rewound(model):
    """The window holds what one rewound token needs, not more."""
    with kvtier.offload(model, FEW) as kv:
        batch = prefill(kv, texts(60, 60))
        forward(model, texts(1, 1, seed=60), batch)
        batch.rewind()
        with pytest.raises(kvtier.UnsupportedError, match="was longer than a token"):
            batch.fork().rewind()


def test_a_fork_counts_the_pads_of_its_batch(model):
    """Masks of all columns go on with it too."""
    (ids, mask), (new, new_mask) = padded(texts(40, 9), extra=2), padded(texts(6, 2, seed=60))
    with kvtier.offload(model, FEW) as kv:
        batch = kv.prefill(ids, attention_mask=mask)
        fork = batch.fork()
        assert fork.get_seq_length() == batch.get_seq_length() == 42
        logits = [
            model(new, attention_mask=torch.cat((mask, new_mask), 1), past_key_values=cache).logits[:, -1]
            for cache in (fork, batch)
        ]
    close(*logits)


def test_a_batch_with_select_0_sees_sinks_and_window_alone(model):
    blind = settings(select=0)
    rows = texts(100, 60)
    with kvtier.offload(model, blind):
        expected = last(forward(model, rows))
    with kvtier.offload(model, FEW) as kv:
        logits = last(forward(model, rows, kv.new_cache(rows=2).fork(select=0)))
        assert not torch.allclose(last(forward(model, rows)), logits, atol=1e-3)
    close(logits, expected)


# -- taking turns -----------------------------------------------------------------------------------------------------


def make_caches(kv):
    """A single cache, a batch of two, a batch of three forks of the single one; the texts of their rows."""
    book, pair = kv.prefill(BOOK), texts(70, 21, seed=60)
    return [book, prefill(kv, pair), book.fork(rows=3)], [[BOOK], pair, [BOOK] * 3]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_batches_and_single_caches_in_every_order(family):
    """Two tokens each in all six orders: rows are parked, seated again elsewhere, and stay themselves."""
    model, orders = model_of(family), list(itertools.permutations(range(3)))
    with kvtier.offload(model, settings()) as kv:
        caches, rows = make_caches(kv)
        got = [[[] for _ in row] for row in rows]
        for step, order in enumerate(orders):
            for i in order:
                news = [TOKENS[3 * i + r][step : step + 1] for r in range(len(rows[i]))]
                for r, logits in enumerate(forward(model, news, caches[i])):
                    got[i][r].append(logits)
        assert held(kv)[1] <= 3
    for i, texts_of in enumerate(rows):
        for r, text in enumerate(texts_of):
            whole = torch.cat((text, TOKENS[3 * i + r]))
            close(torch.cat(got[i][r]), stock_logits(family, whole)[len(text) :], 1e-4)


def test_chosen_chunks_of_batches_and_single_caches_that_take_turns(case):
    """As above where chunks are really chosen, against the same tokens without taking turns."""
    family, config = case
    model, results = model_of(family), []
    for orders in (list(itertools.permutations(range(3))), [(0,)] * 6 + [(1,)] * 6 + [(2,)] * 6):
        with kvtier.offload(model, config) as kv:
            caches, rows = make_caches(kv)
            got, steps = [[] for _ in rows], [0, 0, 0]
            for i in itertools.chain.from_iterable(orders):
                news = [TOKENS[3 * i + r][steps[i] : steps[i] + 1] for r in range(len(rows[i]))]
                got[i].append(last(forward(model, news, caches[i])))
                steps[i] += 1
        results.append([torch.stack(logits) for logits in got])
    for a, b in zip(*results, strict=True):
        close(a, b)


def test_rows_and_forks_between_the_steps_of_a_batch(model):
    rows = texts(60, 25)
    with kvtier.offload(model, FEW) as kv:
        cache, got, kept = prefill(kv, [row[:-1] for row in rows]), [], []
        tokens = [row[-1:] for row in rows]
        for step in range(12):
            got.append(last(forward(model, tokens, cache)))
            tokens = list(got[-1].argmax(-1)[:, None])
            kept.append(cache.row(step % 2) if step % 3 else cache.fork())
            if step % 4 == 1:
                generate(model, [prompt(9, seed=step)[0]] * kept[-1].n_rows, 2, past_key_values=kept[-1])
    scores = torch.stack(got, dim=1)
    expected = torch.stack([alone("llama", FEW, row)[1] for row in rows])
    close(scores[:, 0], expected[:, 0], 2e-2)  # the prompt came in other blocks, which choose other chunks
    with kvtier.offload(model, FEW) as kv:
        cache = prefill(kv, [row[:-1] for row in rows])
        tokens = [row[-1:] for row in rows]
        for step in range(12):
            close(last(forward(model, tokens, cache)), got[step])
            tokens = list(got[step].argmax(-1)[:, None])


# -- budgets ----------------------------------------------------------------------------------------------------------


def room_for_seats(model, n, rows):
    """A device budget for ``n`` seats, the summaries of ``rows`` rows, and not much more."""
    sizes = kvtier.offload(model, FEW)._runtime._sizes
    pool = sizes.pool_slots * sizes.chunk_bytes
    budget = sizes.fixed + pool + (n - 1) * window_bytes(model, FEW) + rows * sizes.summaries
    assert kvtier.offload(model, {**FEW, "budget": {"gpu": budget}})._runtime._sizes.pool_slots == sizes.pool_slots
    return {**FEW, "budget": {"gpu": budget}}


def test_a_batch_with_a_row_too_many_names_the_row(model):
    """Its own cache, other caches and batches that fit are served as before; its bytes are given back."""
    rows, one_seat = texts(60, 20, 9, 40), window_bytes(model, FEW)
    with kvtier.offload(model, room_for_seats(model, 2, 3)) as kv:
        single = kv.prefill(rows[0])
        before = held(kv)
        big = kv.new_cache(rows=12)
        with pytest.raises(
            kvtier.BudgetError, match=r"the windows of row \d+ of a batch of 12.*Raise \[budget\] gpu by"
        ) as caught:
            forward(model, 3 * rows, big)
        row = int(re.search(r"the windows of row (\d+) of", str(caught.value))[1])
        assert row == 2 + kv._runtime._gpu.free_bytes // one_seat > 2, "the first row that does not fit"
        assert stored(big) == [[]] * 12
        assert held(kv) == before, "bytes of seats that were taken before the refusal"
        tokens, logits = generate(model, [rows[0]], past_key_values=single)
        assert_rows_as_alone("llama", FEW, rows[:1], tokens, logits)
        tokens, logits = generate(model, rows[1:3])
        assert_rows_as_alone("llama", FEW, rows[1:3], tokens, logits)
        tokens, logits = generate(model, rows[3:], past_key_values=big.row(3))
        assert_rows_as_alone("llama", FEW, rows[3:], tokens, logits)


def test_the_row_that_does_not_fit_fits_with_what_the_message_says(model):
    rows, budget, raised = texts(60, 20, 9, 40), room_for_seats(model, 1, 4)["budget"]["gpu"], 0
    while True:
        with kvtier.offload(model, {**FEW, "budget": {"gpu": budget}}):
            try:
                tokens, logits = generate(model, rows)
                break
            except kvtier.BudgetError as error:
                raised += 1
                number, unit = re.search(r"by at least ([\d.]+) (B|KiB)", str(error)).groups()
                budget += int((float(number) + 0.01) * {"B": 1, "KiB": 2**10}[unit])
    assert 2 <= raised <= 12
    assert_rows_as_alone("llama", FEW, rows, tokens, logits)


def test_windows_that_do_not_fit_the_host(model, monkeypatch):
    """A fork of a batch parks each row. What is refused leaves no reference behind, and the batch goes on."""
    monkeypatch.setattr(host_pool, "SLAB_BYTES", 1024)
    rows, turn = texts(*range(60, 68)), texts(*[1] * 8, seed=90)
    full = r"\[budget\] host = .* is full: .* would have to go elsewhere"
    config = {**FEW, "budget": {"host": minimum_budget(model, FEW, "host") + (160 << 10)}}
    with kvtier.offload(model, config) as kv:
        empty = held(kv)
        batch = prefill(kv, rows)
        before, chunks = held(kv), held(kv)[0]["host"][1]
        with pytest.raises(kvtier.BudgetError, match=full):
            batch.fork()
        assert held(kv) == before
        with pytest.raises(kvtier.BudgetError, match=full):
            generate(model, texts(*[20] * 8, seed=70))
        gc.collect()
        assert held(kv)[0]["host"][1] == chunks
        logits = last(forward(model, turn, batch))
        del batch
        gc.collect()
        left = held(kv)
        assert (left[0]["device"], left[0]["host"][1], left[1]) == (empty[0]["device"], 0, 1)
    with kvtier.offload(model, FEW) as kv:
        close(logits, last(forward(model, turn, prefill(kv, rows))))


def test_a_window_that_could_not_be_loaded_is_loaded_again(model, monkeypatch):
    """An exception between two rows' seats leaves every row what it was."""
    rows, others, turn = texts(60, 40, 20), texts(60, 40, 20, seed=70), texts(1, 1, 1, seed=90)
    with kvtier.offload(model, FEW) as kv:
        batch, other = prefill(kv, rows), prefill(kv, others)
        with monkeypatch.context() as patch:
            load, calls = Windows.load, []

            def fail(self, parked):
                calls.append(1)
                if len(calls) == 2:
                    raise MemoryError
                load(self, parked)

            patch.setattr(Windows, "load", fail)
            with pytest.raises(MemoryError):
                forward(model, turn, batch)
        logits = torch.cat([last(forward(model, turn, cache)) for cache in (batch, other)])
    for row, new, scores in zip(rows + others, 2 * turn, logits, strict=True):
        with kvtier.offload(model, FEW) as kv:
            close(scores, forward(model, [new], kv.prefill(row))[0][-1])


# -- deletion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["batch", "forks", "rows", "no cache"])
def test_deleted_batches_give_everything_back(case, what):
    family, config = case
    model = model_of(family)
    with kvtier.offload(model, config) as kv:
        single = kv.prefill(BOOK)
        before = held(kv)
        if what == "no cache":
            generate(model, texts(60, 30, 9), 4)
        else:
            caches = [prefill(kv, texts(60, 30, 9))]
            if what != "batch":
                caches += [caches[0].fork(), single.fork(rows=2), caches[0].row(1)]
            for cache in caches:
                generate(model, texts(*range(5, 5 + cache.n_rows), seed=60), 4, past_key_values=cache)
            if what == "rows":
                caches = [caches[0].row(0), caches[1].row(2)]
                gc.collect()
                assert held(kv)[0]["device"][0] > before[0]["device"][0]
            del caches, cache
        gc.collect()
        after = held(kv)
        assert (after[1] or 1) == 1
        if "host" in after[0] and after[1]:  # the single cache's window may be parked now
            assert after[0]["host"][1] == before[0]["host"][1]
        assert after[0]["device"][0] == before[0]["device"][0]
        tokens, logits = generate(model, texts(9, seed=90), 4, past_key_values=single)
    with kvtier.offload(model, config) as kv:
        expected = generate(model, texts(9, seed=90), 4, past_key_values=kv.prefill(BOOK))
    assert tokens.tolist() == expected[0].tolist()
    close(logits, expected[1])


def test_the_next_call_frees_what_dead_batches_held(model):
    with kvtier.offload(model, FEW) as kv:
        single, host = kv.prefill(BOOK), kv._runtime.engine.residency.host
        alone_in_it = len(host)
        batch = prefill(kv, texts(60, 30))
        assert len(host) > alone_in_it
        del batch
        gc.collect()
        forward(model, texts(1, seed=60), single)
        assert len(host) == alone_in_it


def test_an_idle_batch_lends_its_seats(model):
    """A single cache needs no further seat beside a batch that does not run, and the other way round."""
    with kvtier.offload(model, FEW) as kv:
        batch, seats = prefill(kv, texts(60, 30, 9)), []
        single = kv.prefill(BOOK)
        seats.append(held(kv)[1])
        forward(model, texts(1, 1, 1, seed=60), batch)
        seats.append(held(kv)[1])
        other = prefill(kv, texts(40, 40))
        seats.append(held(kv)[1])
        assert seats == [3, 3, 3]
        del batch, other
        gc.collect()
        assert held(kv)[1] == 1
        assert single.get_seq_length() == 120
