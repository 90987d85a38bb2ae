"""Who calls the model inside a block: pipelines, loops written by hand, other threads, any autograd mode."""

import threading
import warnings

import pytest
import torch
from models import CACHE_NAME, assert_untouched, cache_of, fingerprint, settings
from rows import (
    FEW,
    GREEDY,
    alone,
    assert_rows_as_alone,
    close,
    forward,
    generate,
    lists,
    model_of,
    padded,
    pristine,
    stock_logits,
    stored,
    texts,
    tokenizer,
)
from transformers import pipeline

import kvtier


@pytest.fixture
def model():
    shared = model_of("llama")
    before = fingerprint(shared)
    yield shared
    assert_untouched(shared, before)


# -- pipelines --------------------------------------------------------------------------------------------------------


WORDS = tokenizer()
PROMPTS = [WORDS.decode(text) for text in texts(60, 5, 23)]
CHATS = [[{"role": "user", "content": content}, {"role": "assistant", "content": "w0009"}] for content in PROMPTS]
ANSWER = {"do_sample": False, "max_new_tokens": 12, "no_repeat_ngram_size": 1}


def written(pipe, *args, **arguments):
    """The generated texts of a pipeline's answers, one list."""
    out = pipe(*args, **ANSWER | {"return_full_text": False} | arguments)
    return [a["generated_text"] for answer in out for a in (answer if isinstance(answer, list) else [answer])]


def inside_and_outside(model, *args, config=None, **arguments):
    """What a pipeline in the block writes, and one of a model that was never in a block."""
    outside = written(pipeline("text-generation", model=pristine("llama"), tokenizer=WORDS), *args, **arguments)
    with kvtier.offload(model, config or settings()) as kv:
        inside = written(pipeline("text-generation", model=model, tokenizer=WORDS), *args, **arguments)
        assert kv.stats()["decode"]["steps"] > 0, "the pipeline did not run on kvtier"
    assert all(text.strip() for text in inside)
    return inside, outside


def test_a_pipeline_with_one_prompt(model):
    inside, outside = inside_and_outside(model, PROMPTS[0])
    assert inside == outside
    assert len(inside) == 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_with_a_list_of_prompts(model, batch_size):
    """Batches are padded on the left, the last one has one row."""
    inside, outside = inside_and_outside(model, PROMPTS, batch_size=batch_size)
    assert inside == outside
    assert len(set(inside)) == 3
    assert inside_and_outside(model, PROMPTS)[0] == inside, "a batch writes other texts than its rows alone"


def test_a_pipeline_with_end_tokens(model):
    (text,), _ = inside_and_outside(model, PROMPTS[0])
    ends = WORDS.convert_tokens_to_ids(text.split()[3:9:2])
    inside, outside = inside_and_outside(model, PROMPTS, batch_size=3, eos_token_id=ends)
    assert inside == outside
    assert len(inside[0].split()) == 4


def test_a_pipeline_with_chats(model):
    inside, outside = inside_and_outside(model, CHATS[0])
    assert inside == outside
    inside, outside = inside_and_outside(model, CHATS, batch_size=2)
    assert inside == outside
    assert len(inside) == 3


def test_a_pipeline_that_samples_several_sequences(model):
    arguments = {"do_sample": True, "num_return_sequences": 2, "top_k": 20, "batch_size": 2}
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(
            written(pipeline("text-generation", model=pristine("llama"), tokenizer=WORDS), PROMPTS[:2], **arguments)
        )
    with kvtier.offload(model, settings()):
        torch.manual_seed(3)
        inside = written(pipeline("text-generation", model=model, tokenizer=WORDS), PROMPTS[:2], **arguments)
    assert inside == results[0] == results[1]
    assert len(set(inside)) == 4


def test_a_pipeline_made_before_the_block_runs_in_it_and_after_it(model):
    pipe = pipeline("text-generation", model=model, tokenizer=WORDS)
    before = written(pipe, PROMPTS, batch_size=2)
    with kvtier.offload(model, settings()) as kv:
        inside = written(pipe, PROMPTS, batch_size=2)
        assert kv.stats()["decode"]["steps"] > 0
        book = kv.prefill(WORDS(PROMPTS[0])["input_ids"])
        on_a_book = written(pipe, PROMPTS[0], **{CACHE_NAME: book.fork()})
    assert before == inside == written(pipe, PROMPTS, batch_size=2)
    assert on_a_book == before[:1]


def test_a_pipeline_whose_chunks_are_chosen(model):
    inside, outside = inside_and_outside(model, PROMPTS, batch_size=3, config=FEW)
    assert inside[0] != outside[0]
    assert inside == inside_and_outside(model, PROMPTS, batch_size=1, config=FEW)[0]


# -- loops by hand ----------------------------------------------------------------------------------------------------


def test_a_loop_of_single_tokens(model):
    text = texts(90)[0]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache()
        logits = [model(token[None], past_key_values=cache).logits[0] for token in text.split(1)]
        assert stored(cache) == [text.tolist()]
    close(torch.cat(logits), stock_logits("llama", text), 1e-4)


@pytest.mark.parametrize("sizes", [(7, 30, 1, 52), (45, 45), (1, 89)], ids=str)
def test_a_loop_of_blocks_with_masks_and_positions(model, sizes):
    """As a user writes it: all columns so far in the mask, positions that go on."""
    text, logits, n = texts(90)[0][None], [], 0
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache()
        for piece in text.split(list(sizes), dim=1):
            places = torch.arange(n, n + piece.shape[1])[None]
            n += piece.shape[1]
            out = model(piece, torch.ones(1, n, dtype=torch.long), places, cache, use_cache=True)
            assert cache_of(out) is cache
            logits.append(out.logits[0])
    close(torch.cat(logits), stock_logits("llama", text[0]), 1e-4)


@pytest.mark.parametrize("config", [FEW, settings()], ids=["chosen", "all"])
def test_a_greedy_loop_over_a_batch_with_masks_and_positions(model, config):
    """What stock models need: a mask that grows, positions from its cumulative sum."""
    rows, tokens, logits = texts(70, 3, 31), [], []
    ids, mask = padded(rows)
    with kvtier.offload(model, config) as kv:
        cache = kv.new_cache(rows=3)
        places = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        for _ in range(12):
            out = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
            assert out.logits.shape[:2] == (3, 1)
            logits.append(out.logits[:, -1])
            ids, places = logits[-1].argmax(-1, keepdim=True), places[:, -1:] + 1
            mask = torch.cat((mask, torch.ones(3, 1, dtype=mask.dtype)), 1)
            tokens.append(ids)
        assert stored(cache) == [
            row.tolist() + new[:-1].tolist() for row, new in zip(rows, torch.cat(tokens, 1), strict=True)
        ]
    assert_rows_as_alone("llama", config, rows, torch.cat(tokens, 1), torch.stack(logits, 1))


@pytest.mark.parametrize("wrong", ["columns", "shifted", "another row"])
def test_positions_that_count_pads_are_refused(model, wrong):
    rows = texts(20, 5)
    ids, mask = padded(rows)
    right = (mask.cumsum(1) - 1).clamp(min=0)
    places = {"columns": torch.arange(20)[None], "shifted": right + 1, "another row": right.flip(0)}[wrong]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows=2)
        with pytest.raises(kvtier.UnsupportedError, match="position_ids must be"):
            model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        assert stored(cache) == [[], []]
        model(ids, attention_mask=mask, position_ids=right, past_key_values=cache)
        assert stored(cache) == lists(rows)


@pytest.mark.parametrize("keep", [1, 2, 5, 40, 99])
def test_logits_to_keep_of_a_batch(model, keep):
    """The last columns; zeros at pads, as when all are kept."""
    ids, mask = padded(texts(70, 3, 31))
    with kvtier.offload(model, FEW):
        every = model(ids, attention_mask=mask).logits
        kept = model(ids, attention_mask=mask, logits_to_keep=keep).logits
    assert kept.shape[1] == min(keep, 70)
    close(kept, every[:, -keep:])


def test_a_batch_as_a_tuple(model):
    ids, mask = padded(texts(30, 4))
    with kvtier.offload(model, FEW):
        logits, cache = model(ids, attention_mask=mask, return_dict=False)
        more, same = model(ids[:, -1:], past_key_values=cache, return_dict=False)
        assert same is cache
        assert cache.n_rows == 2
        assert logits.shape[:2] == (2, 30)
        assert more.shape[:2] == (2, 1)
        close(logits, model(ids, attention_mask=mask).logits)


def test_calls_without_a_cache_are_independent(model):
    with kvtier.offload(model, FEW):
        first, _, again = (forward(model, rows)[0] for rows in (texts(40, 9), texts(33), texts(40, 9)))
    assert torch.equal(first, again)


# -- modes and threads ------------------------------------------------------------------------------------------------


MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize("first", MODES)
def test_caches_go_on_in_another_mode(model, first, second):
    rows, more = texts(60, 20), texts(20, 3, seed=90)
    with kvtier.offload(model, settings()) as kv:
        with MODES[first]():
            batch = kv.new_cache(rows=2)
            forward(model, rows, batch)
            fork = batch.fork()
        with MODES[second]():
            got = [forward(model, more, cache) for cache in (batch, fork)]
            tokens, _ = generate(model, rows, 4)
        with MODES[first]():
            tail = forward(model, texts(1, 1, seed=80), fork)
        assert not got[0][0].requires_grad
        assert tokens.shape == (2, 4)
    for i, (row, new) in enumerate(zip(rows, more, strict=True)):
        expected = stock_logits("llama", torch.cat((row, new, texts(1, 1, seed=80)[i])))[len(row) :]
        for logits in got:
            close(logits[i].clone(), expected[:-1], 1e-4)
        close(tail[i].clone(), expected[-1:], 1e-4)


def in_a_thread(work):
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join(60)
    return result[0]


@pytest.mark.parametrize("where", ["block in main", "all in a thread", "a new thread each"])
def test_generate_in_another_thread(model, where):
    """Autograd modes are of a thread; none must be needed."""
    rows, run = texts(70, 9), in_a_thread if where == "a new thread each" else lambda work: work()

    def work():
        with kvtier.offload(model, FEW) as kv:
            cache = run(lambda: kv.prefill(padded(rows)[0], attention_mask=padded(rows)[1]))
            fork = run(cache.fork)
            one = (in_a_thread if where == "block in main" else run)(
                lambda: generate(model, rows, past_key_values=cache)
            )
            return one, run(lambda: generate(model, rows, past_key_values=fork))

    for tokens, logits in in_a_thread(work) if where == "all in a thread" else work():
        assert_rows_as_alone("llama", FEW, rows, tokens, logits)


def test_caches_that_die_in_another_thread(model):
    """Their chunks are freed at the next call, whoever makes it."""
    with kvtier.offload(model, FEW) as kv:
        book = kv.prefill(texts(90)[0])
        before = kv.stats()["tiers"]["host"]["chunks"]
        for seed in range(3):
            in_a_thread(lambda s=seed: generate(model, texts(50, 60, seed=s), 2)[0].tolist())
        assert kv.stats()["tiers"]["host"]["chunks"] == before
        out = model.generate(texts(90)[0][None], past_key_values=book, **GREEDY)
    assert out[0, 90:].tolist() == alone("llama", FEW, texts(90)[0])[0].tolist()


def test_nothing_warns(model):
    with warnings.catch_warnings(), kvtier.offload(model, FEW) as kv:
        warnings.simplefilter("error")
        cache = kv.new_cache(rows=2)
        generate(model, texts(40, 9), past_key_values=cache)
        generate(model, texts(1, 9), past_key_values=cache.fork())
        model.generate(texts(9)[0][None], do_sample=True, num_return_sequences=2, max_new_tokens=3)
