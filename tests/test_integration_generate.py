"""What stock generate() offers, on kvtier caches: several sequences, sampling, streaming, processors, criteria."""

import threading
import time

import pytest
import torch
from models import assert_untouched, cache_of, fingerprint, prompt, settings
from rows import (
    DETAILS,
    FEW,
    GREEDY,
    WORDS,
    close,
    held,
    lists,
    model_of,
    padded,
    pristine,
    stored,
    texts,
    tokenizer,
)
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import kvtier

BOOK, QUESTION = texts(100)[0][None], texts(12, seed=60)[0][None]
TEXT = torch.cat((BOOK, QUESTION), dim=1)
SAMPLE = {"do_sample": True, "max_new_tokens": 12, "top_k": 20, "temperature": 0.8}


@pytest.fixture
def model():
    shared = model_of("llama")
    before = fingerprint(shared)
    yield shared
    assert_untouched(shared, before)


def seeded(model, *args, seed=7, **arguments):
    torch.manual_seed(seed)
    return model.generate(*args, **arguments)


def stock(ids, **arguments):
    return pristine("llama").generate(ids, attention_mask=torch.ones_like(ids), **GREEDY | arguments)


def varied(**arguments):
    """Greedy, no token twice: else tiny models say one thing again and again."""
    return GREEDY | {"no_repeat_ngram_size": 1} | arguments


# -- several sequences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(60,), (1,), (2,), (60, 1, 30), (1, 1)], ids=str)
def test_several_sequences_with_a_seed_are_those_of_stock(model, lengths):
    """Every chunk is selected: the same draws from the same probabilities."""
    ids, mask = padded(texts(*lengths))
    arguments = SAMPLE | {"num_return_sequences": 3, "attention_mask": mask}
    expected = seeded(pristine("llama"), ids, **arguments)
    assert len({tuple(row) for row in expected.tolist()}) == 3 * len(lengths)
    with kvtier.offload(model, settings()) as kv:
        assert seeded(model, ids, **arguments).tolist() == expected.tolist()
        assert kv.stats()["prefill"]["computed_tokens"] <= mask.sum() + 2 * len(lengths), (
            "a prompt was read more than once"
        )
        assert seeded(model, ids, **arguments, past_key_values=kv.new_cache(len(lengths))).tolist() == expected.tolist()


@pytest.mark.parametrize("end", ["eos", "no eos"])
@pytest.mark.parametrize("given", ["question", "whole"])
def test_several_sequences_of_a_book(model, given, end):
    """The book is read once; its cache then holds all of the prompt but its last token, which every sequence reads."""
    ends = {"eos_token_id": list(range(1, WORDS, 9))} if end == "eos" else {}
    arguments = SAMPLE | {"num_return_sequences": 4} | ends
    expected = seeded(pristine("llama"), TEXT, attention_mask=torch.ones_like(TEXT), **arguments)[:, 112:].tolist()
    ids = QUESTION if given == "question" else TEXT
    with kvtier.offload(model, settings()) as kv:
        book = kv.prefill(BOOK)
        out = seeded(model, ids, past_key_values=book, **arguments, return_dict_in_generate=True)
        assert out.sequences[:, ids.shape[1] :].tolist() == expected
        assert stored(book) == [TEXT[0, :-1].tolist()]
        assert kv.stats()["prefill"]["computed_tokens"] == 111
        forks = cache_of(out)
        assert forks.n_rows == 4
        counts = [next((i for i, t in enumerate(r) if t in ends.get("eos_token_id", [])), 11) for r in expected]
        assert stored(forks) == [TEXT[0].tolist() + r[:n] for r, n in zip(expected, counts, strict=True)]
        assert len(set(counts)) > 1 or not ends


def test_several_sequences_of_exactly_the_cached_ids_leave_the_cache_as_it_was(model):
    arguments = SAMPLE | {"num_return_sequences": 2}
    expected = seeded(pristine("llama"), TEXT, attention_mask=torch.ones_like(TEXT), **arguments).tolist()
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(TEXT)
        for _ in range(2):
            assert seeded(model, TEXT, past_key_values=cache, **arguments).tolist() == expected
            assert stored(cache) == lists(TEXT)
        fork = cache.fork()
        assert seeded(model, TEXT, past_key_values=fork, **arguments).tolist() == expected


def test_several_sequences_from_a_generation_config(model):
    config = GenerationConfig(num_return_sequences=3, **SAMPLE)
    expected = seeded(pristine("llama"), TEXT, config).tolist()
    with kvtier.offload(model, settings()):
        assert seeded(model, TEXT, config).tolist() == expected
        assert config.num_return_sequences == 3
        assert seeded(model, TEXT, config, num_return_sequences=1).shape[0] == 1


def test_several_sequences_that_were_not_made_leave_nothing(model):
    def fail(ids, scores):
        raise RuntimeError("mine")

    with kvtier.offload(model, FEW) as kv:
        book = kv.prefill(BOOK)
        before = held(kv)
        with pytest.raises(RuntimeError, match="mine"):
            model.generate(BOOK, past_key_values=book, num_return_sequences=3, logits_processor=[fail], **SAMPLE)
        assert stored(book) == lists(BOOK)
        out = model.generate(QUESTION, past_key_values=book, **GREEDY)
        after = held(kv)
    assert (before[1], after[1]) == (1, 1)
    with kvtier.offload(model, FEW) as kv:
        assert model.generate(QUESTION, past_key_values=kv.prefill(BOOK), **GREEDY).tolist() == out.tolist()


# -- sampling ---------------------------------------------------------------------------------------------------------


HOW = {
    "plain": {},
    "top_p": {"top_p": 0.7, "top_k": 0},
    "min_p": {"min_p": 0.05},
    "typical": {"typical_p": 0.9},
    "repetition": {"repetition_penalty": 1.3},
}


@pytest.mark.parametrize("how", HOW)
def test_sampling_batches_with_a_seed_gives_the_stock_tokens(model, how):
    ids, mask = padded(texts(60, 25, 1))
    arguments = SAMPLE | HOW[how] | {"attention_mask": mask, "eos_token_id": list(range(5, WORDS, 31))}
    expected = seeded(pristine("llama"), ids, **arguments)
    assert expected.tolist() != seeded(pristine("llama"), ids, seed=8, **arguments).tolist()
    with kvtier.offload(model, settings()):
        assert seeded(model, ids, **arguments).tolist() == expected.tolist()


# -- streaming --------------------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    def __init__(self):
        self.pieces, self.ends = [], 0

    def put(self, value):
        self.pieces.append(value.tolist())

    def end(self):
        self.ends += 1


@pytest.mark.parametrize("given", ["question", "whole", "no cache"])
def test_a_text_streamer_prints_what_stock_prints(model, capsys, given):
    words = tokenizer()
    expected = words.decode(stock(TEXT, **varied())[0, 112:])
    with kvtier.offload(model, settings()) as kv:
        cache = None if given == "no cache" else kv.prefill(BOOK)
        ids = QUESTION if given == "question" else TEXT
        banned = {} if given != "question" else {"bad_words_ids": [[t] for t in BOOK[0].tolist()]}
        model.generate(ids, past_key_values=cache, streamer=TextStreamer(words, skip_prompt=True), **varied(**banned))
    assert capsys.readouterr().out.strip() == expected.strip() != ""


def test_an_iterator_streamer_in_a_thread(model):
    words = tokenizer()
    expected = words.decode(stock(TEXT, **varied())[0, 112:])
    with kvtier.offload(model, settings()) as kv:
        streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=30)
        arguments = {"past_key_values": kv.prefill(BOOK), "streamer": streamer, **varied()}
        thread = threading.Thread(target=model.generate, args=(TEXT,), kwargs=arguments)
        thread.start()
        pieces = list(streamer)
        thread.join()
        assert "".join(pieces).strip() == expected.strip()
        assert len([piece for piece in pieces if piece.strip()]) > 3
        more = model.generate(TEXT, past_key_values=kv.prefill(BOOK), **varied())
    assert words.decode(more[0, 112:]).strip() == expected.strip()


def test_a_streamer_of_ones_own_gets_a_batch_as_in_stock(model):
    ids, mask = padded(texts(30, 9))
    recorders = [Recorder(), Recorder()]
    arguments = GREEDY | {"attention_mask": mask}
    pristine("llama").generate(ids, streamer=recorders[0], **arguments)
    with kvtier.offload(model, settings()):
        model.generate(ids, streamer=recorders[1], **arguments)
    assert recorders[0].pieces == recorders[1].pieces
    assert recorders[1].ends == 1
    assert len(recorders[1].pieces) == 13


def test_a_text_streamer_and_a_batch_are_refused_by_stock(model):
    with kvtier.offload(model, settings()):
        with pytest.raises(ValueError, match="TextStreamer only supports batch size 1"):
            model.generate(torch.cat((TEXT, TEXT)), streamer=TextStreamer(tokenizer()), **GREEDY)
        assert model.generate(TEXT, **GREEDY).tolist() == stock(TEXT).tolist()


# -- processors and criteria ------------------------------------------------------------------------------------------


class Multiples(LogitsProcessor):
    """Only tokens that the number of ids so far divides with a rest of 1."""

    def __call__(self, input_ids, scores):
        allowed = torch.arange(scores.shape[1]) % (input_ids.shape[1] % 7 + 2) == 1
        return scores.masked_fill(~allowed, -torch.inf)


@pytest.fixture(scope="module")
def plain():
    """Stock's greedy answer with no token twice."""
    return stock(TEXT, **varied())[0, 112:].tolist()


PROCESSORS = {
    "custom": lambda plain: {"logits_processor": LogitsProcessorList([Multiples()])},
    "repetition_penalty": lambda plain: {"repetition_penalty": 1.8},
    "no_repeat_ngram": lambda plain: {"no_repeat_ngram_size": 2},
    "min_new_tokens": lambda plain: {"min_new_tokens": 9, "eos_token_id": plain[3:5], "no_repeat_ngram_size": 1},
    "bad_words": lambda plain: {"bad_words_ids": [[plain[0]], plain[1:3]], "no_repeat_ngram_size": 1},
    "suppress": lambda plain: {"suppress_tokens": plain[:4]},
    "sequence_bias": lambda plain: {"sequence_bias": [[[7], 9.0], [[7, 8], 20.0]]},
    "forced_eos": lambda plain: {"forced_eos_token_id": 5},
    "decay": lambda plain: {"exponential_decay_length_penalty": (3, 2.5), "eos_token_id": 5},
    "prefix": lambda plain: {"prefix_allowed_tokens_fn": lambda row, ids: [len(ids) % 50, len(ids) % 60]},
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_a_processor_does_what_it_does_in_stock(model, plain, case):
    """The whole conversation on a book, and a batch."""
    arguments = GREEDY | PROCESSORS[case](plain)
    ids, mask = padded([TEXT[0], texts(30, seed=80)[0]])
    expected = stock(TEXT, **arguments).tolist()
    batch = pristine("llama").generate(ids, attention_mask=mask, **arguments).tolist()
    assert expected != stock(TEXT).tolist()
    with kvtier.offload(model, settings()) as kv:
        assert model.generate(TEXT, past_key_values=kv.prefill(BOOK), **arguments).tolist() == expected
        assert model.generate(ids, attention_mask=mask, **arguments).tolist() == batch


class AtColumn(StoppingCriteria):
    def __init__(self, n):
        self.n, self.seen = n, []

    def __call__(self, input_ids, scores, **_):
        self.seen.append(input_ids.shape)
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.n)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("eos", [None, 5])
def test_a_stopping_criterion_is_asked_once_a_step(model, rows, eos):
    stop = AtColumn(116)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows)
        out = model.generate(
            TEXT.repeat(rows, 1), past_key_values=cache, stopping_criteria=[stop], eos_token_id=eos, **GREEDY
        )
        assert stored(cache) == [row[:-1].tolist() for row in out]
    assert stop.seen == [(rows, n) for n in range(113, 117)]
    assert out.tolist() == stock(TEXT)[:, :116].repeat(rows, 1).tolist()


@pytest.mark.parametrize("rows", [1, 3])
def test_max_time(model, rows):
    with kvtier.offload(model, settings()):
        started = time.perf_counter()
        out = model.generate(
            TEXT.repeat(rows, 1), do_sample=False, max_new_tokens=10**4, max_time=0.2, eos_token_id=None
        )
        assert time.perf_counter() - started < 10
        assert 112 < out.shape[1] < 10**4
        criteria = StoppingCriteriaList([MaxTimeCriteria(0.0)])
        assert model.generate(TEXT.repeat(rows, 1), stopping_criteria=criteria, **GREEDY).shape == (rows, 113)


def test_stop_strings_of_a_single_row(model, plain):
    words = tokenizer()
    string = words.convert_ids_to_tokens(plain[5])
    arguments = varied(stop_strings=[string], tokenizer=words)
    expected = stock(TEXT, **arguments)
    assert 113 < expected.shape[1] <= 118
    with kvtier.offload(model, settings()):
        assert model.generate(TEXT, **arguments).tolist() == expected.tolist()


def test_lengths_count_the_given_ids_as_in_stock(model):
    with kvtier.offload(model, settings()) as kv:
        assert model.generate(TEXT, do_sample=False, max_length=115, past_key_values=kv.prefill(BOOK)).shape == (1, 115)
        assert model.generate(QUESTION, do_sample=False, max_length=15, past_key_values=kv.prefill(BOOK)).shape == (
            1,
            15,
        )


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2])
def test_details_are_those_of_stock(model, rows):
    ids, mask = padded([TEXT[0], texts(20, seed=80)[0]][:rows])
    arguments = GREEDY | DETAILS | {"output_scores": True, "repetition_penalty": 1.5, "attention_mask": mask}
    expected = pristine("llama").generate(ids, **arguments)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.new_cache(rows)
        out = model.generate(ids, past_key_values=cache, **arguments)
        assert type(out) is type(expected)
        assert out.keys() == expected.keys()
        assert cache_of(out) is cache
    assert out.sequences.tolist() == expected.sequences.tolist()
    close(torch.stack(out.logits), torch.stack(expected.logits), 1e-4)
    close(torch.stack(out.scores), torch.stack(expected.scores), 1e-4)
    if rows == 1:
        scores = [m.compute_transition_scores(o.sequences, o.scores) for m, o in ((model, out), (model, expected))]
        close(scores[0], scores[1], 1e-4)


def test_logits_of_ended_rows_are_zeros(model, plain):
    """They are not computed; stock's are those of pads."""
    ids, mask = padded([TEXT[0], texts(20, seed=80)[0]])
    with kvtier.offload(model, settings()):
        out = model.generate(ids, attention_mask=mask, eos_token_id=plain[2], pad_token_id=9, **varied(), **DETAILS)
    assert out.sequences[0, 112:].tolist() == plain[:3] + [9] * 9
    assert [bool(step[0].any()) for step in out.logits] == [True] * 3 + [False] * 9
    assert all(step[1].any() for step in out.logits)


BEAMS = {
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 2},
    "assistant": {"assistant_model": True},
}


@pytest.mark.parametrize("case", BEAMS)
def test_beams_and_assistants_are_refused_on_batches_and_nothing_changes(model, case):
    arguments = GREEDY | {k: model if v is True and k == "assistant_model" else v for k, v in BEAMS[case].items()}
    rows = texts(30, 20)
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(padded(rows)[0], attention_mask=padded(rows)[1])
        before = held(kv)
        with pytest.raises(kvtier.UnsupportedError, match=r"beam search|assisted decoding"):
            model.generate(torch.stack(texts(3, 3)), past_key_values=cache, **arguments)
        assert (stored(cache), held(kv)) == (lists(rows), before)
        out = model.generate(prompt(9), **GREEDY)
    assert out.tolist() == stock(prompt(9)).tolist()
