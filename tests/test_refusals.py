"""What kvtier refuses, each with its reason, before any work and with the model untouched; never silently wrong."""

import contextlib
import errno
import gc
import os
import re

import pytest
import torch
from models import (
    CACHE_NAME,
    PAD,
    assert_untouched,
    fingerprint,
    minimum_budget,
    prompt,
    settings,
    tiny_config,
    tiny_llama,
)
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    GPT2Config,
    LlamaForSequenceClassification,
    LlamaModel,
    Ministral3Config,
    OlmoConfig,
    StaticCache,
)

import kvtier
from kvtier.runtime import host_pool, slabs

GREEDY = {"do_sample": False, "max_new_tokens": 8}
BOOK, QUESTION = prompt(150), prompt(25, seed=1)
TEXT = torch.cat((BOOK, QUESTION), dim=1)
Unsupported = kvtier.UnsupportedError


@pytest.fixture(scope="module")
def shared():
    return tiny_llama()


@pytest.fixture
def model(shared):
    """A model that must be as it was after every test."""
    before = fingerprint(shared)
    yield shared
    assert_untouched(shared, before)


@pytest.fixture(scope="module")
def answer(shared):
    return shared.generate(TEXT, **GREEDY)[:, 175:].tolist()


class idle:
    """No layer of the model runs inside: what is refused there is refused before any work."""

    def __init__(self, model):
        self.layers, self.handles = model.model.layers, []

    def __enter__(self):
        self.handles = [layer.register_forward_pre_hook(self.ran) for layer in self.layers]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    @staticmethod
    def ran(module, args):
        pytest.fail("the model ran before the call was refused")


@contextlib.contextmanager
def refused(error, message):
    """The block raises ``error`` with ``message``, a regular expression."""
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert isinstance(caught.value, kvtier.KvtierError | ValueError)


def assert_still_serves(model, kv, cache, answer):
    """The cache has what it had, and gives the stock answer."""
    assert cache.token_ids.tolist() == BOOK[0].tolist()
    assert model.generate(QUESTION, past_key_values=cache, **GREEDY)[:, 25:].tolist() == answer


# -- models -----------------------------------------------------------------------------------------------------------


TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OTHER_FAMILIES = {
    "ministral3": (
        lambda: Ministral3Config(**TINY, head_dim=8),
        "modeling_ministral3.Ministral3Attention",
        "it scales queries by their position",
    ),
    "olmo": (lambda: OlmoConfig(**TINY), "modeling_olmo.OlmoAttention", "not tested with kvtier"),
    "gpt2": (
        lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2),
        "modeling_gpt2.GPT2Attention",
        "its positions are not rotary",
    ),
}


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_another_family(family):
    make, attention, reason = OTHER_FAMILIES[family]
    model = AutoModelForCausalLM.from_config(make()).eval()
    before = fingerprint(model)
    name = type(model).__name__
    used = rf"it uses .*{re.escape(attention)} \(.*{reason}.*\) as \S+\.0\.\S*attn"
    with refused(Unsupported, rf"{name} is not supported: {used}. Supported families: Llama, Mistral, "):
        kvtier.offload(model, settings(window=256))
    assert_untouched(model, before)


def test_a_subclass_of_llama_attention():
    """By the exact class: what a subclass changed is unknown."""
    model = tiny_llama()
    attention = model.model.layers[1].self_attn
    attention.__class__ = type("MyAttention", (type(attention),), {})
    with refused(Unsupported, r"it uses .*MyAttention"):
        kvtier.offload(model, settings())


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaModel(tiny_config()),
        lambda: LlamaForSequenceClassification(tiny_config()),
        lambda: torch.nn.Linear(3, 3),
        lambda: "meta-llama/Llama-3.2-1B",
        lambda: None,
    ],
    ids=["base-model", "classifier", "module", "name", "None"],
)
def test_not_a_causal_language_model(make):
    thing = make()
    with refused(Unsupported, rf"needs a transformers causal language model .*, not {type(thing).__name__}"):
        kvtier.offload(thing, settings())


def test_training_mode():
    model = tiny_llama().train()
    with refused(Unsupported, r"the model is in training mode: call model.eval\(\) first"):
        kvtier.offload(model, settings())


def test_a_model_put_into_training_mode_inside_the_block():
    """Its dropout would be ignored without a word."""
    model = tiny_llama(attention_dropout=0.5)
    with kvtier.offload(model, settings()):
        model.train()
        with idle(model), refused(Unsupported, "training mode"):
            model(TEXT)


def test_output_attentions_in_the_config():
    model = tiny_llama(attn_implementation="eager", output_attentions=True)
    with refused(Unsupported, r"config.output_attentions = True: kvtier never has the whole attention matrix"):
        kvtier.offload(model, settings())


def test_output_hidden_states_in_the_config():
    """The hidden states of the last block alone would be returned."""
    model = tiny_llama()
    model.config.output_hidden_states = True
    with refused(Unsupported, "output_hidden_states"), kvtier.offload(model, settings()):
        model(TEXT)


def test_a_sliding_window_in_a_llama_config_means_nothing(answer):
    """Stock Llama ignores it too."""
    model = tiny_llama()
    model.config.sliding_window = 64
    with kvtier.offload(model, settings()):
        assert model.generate(TEXT, **GREEDY)[:, 175:].tolist() == answer


def test_weights_on_two_devices():
    model = tiny_llama()
    model.lm_head.to("meta")
    with refused(Unsupported, "weights are on 2 devices"):
        kvtier.offload(model, settings())


def test_a_model_without_real_weights():
    with torch.device("meta"):
        model = tiny_llama()
    with refused(Unsupported, r'kvtier runs on "cuda" devices and on the "cpu", not on "meta"'):
        kvtier.offload(model, settings())


# -- what generate is asked for ---------------------------------------------------------------------------------------


GENERATE = {
    "beams": ({"num_beams": 2}, r"num_beams=2\): beam search is not supported"),
    "beam-sampling": ({"num_beams": 3, "do_sample": True}, r"num_beams=3\): beam search"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3.*assisted decoding"),
    "early_exit": ({"assistant_early_exit": 1}, "assistant_early_exit=1.*assisted decoding"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha=0.6.*contrastive search is not supported"),
    "dola": ({"dola_layers": "low"}, "dola_layers='low'.*not supported"),
    "guidance": ({"guidance_scale": 1.5}, r"guidance_scale=1.5.*guidance runs a second sequence"),
    "static": ({"cache_implementation": "static"}, "cache_implementation='static'.*kvtier is the cache"),
    "dynamic": ({"cache_implementation": "dynamic"}, "cache_implementation='dynamic'.*kvtier is the cache"),
    "no-cache": ({"use_cache": False}, "use_cache=False: an offload block is the cache"),
    "attentions": ({"output_attentions": True}, "output_attentions=True.*never has the whole attention matrix"),
    "hidden_states": ({"output_hidden_states": True}, "output_hidden_states=True.*last block's hidden states"),
    "token_healing": ({"token_healing": True}, "token_healing=True.*may already be cached"),
}
"""Settings that can come by keyword or in a GenerationConfig."""


@pytest.mark.parametrize("through", ["keyword", "given config", "model's config"])
@pytest.mark.parametrize("case", GENERATE)
def test_generate_with_the_setting(model, answer, case, through):
    wanted, message = GENERATE[case]
    wanted = {**GREEDY, **wanted}
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with idle(model), refused(Unsupported, message):
            if through == "keyword":
                model.generate(QUESTION, past_key_values=cache, **wanted)
            elif through == "given config":
                model.generate(QUESTION, GenerationConfig(**wanted), past_key_values=cache)
            else:
                with own_generation_config(model, wanted):
                    model.generate(QUESTION, past_key_values=cache)
        assert_still_serves(model, kv, cache, answer)


@contextlib.contextmanager
def own_generation_config(model, wanted):
    """The model's own generation config is a copy with other values."""
    own = model.generation_config
    model.generation_config = GenerationConfig(**{**own.to_dict(), **wanted})
    try:
        yield
    finally:
        model.generation_config = own


def test_a_generation_config_by_keyword(model):
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, "beam search is not supported"):
        model.generate(TEXT, generation_config=GenerationConfig(num_beams=4))


def test_a_keyword_overrules_the_generation_config(model, answer):
    with kvtier.offload(model, settings()):
        out = model.generate(TEXT, GenerationConfig(num_beams=4, **GREEDY), num_beams=1)
    assert out[:, 175:].tolist() == answer


def test_a_given_generation_config_is_obeyed_and_not_changed(model, answer):
    given = GenerationConfig(**GREEDY)
    before = given.to_dict()
    with kvtier.offload(model, settings()):
        assert model.generate(TEXT, given)[:, 175:].tolist() == answer
    assert given.to_dict() == before


def test_several_greedy_sequences(model):
    message = r"num_return_sequences=2\) needs do_sample=True"
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, message):
        model.generate(TEXT, num_return_sequences=2, **GREEDY)


CALLS = {
    "assistant_model": (lambda m: {"assistant_model": m}, "assistant_model.*assisted decoding is not supported"),
    "inputs_embeds": (lambda m: {"inputs_embeds": torch.zeros(1, 5, 32)}, "inputs_embeds.*needs ids, not"),
    "negative_prompt": (lambda m: {"negative_prompt_ids": QUESTION}, "negative_prompt_ids.*guidance"),
    "custom_generate": (lambda m: {"custom_generate": "x/y"}, "custom_generate.*custom decoding loops"),
    "position_ids": (
        lambda m: {"position_ids": torch.arange(25)[None]},
        "position_ids: kvtier gives positions of its own",
    ),
    "right padding": (
        lambda m: {"attention_mask": (torch.arange(25) < 20)[None]},
        "zeros after tokens in row 0: right padding and gaps are not supported, pad on the left",
    ),
    "gap": (lambda m: {"attention_mask": (torch.arange(25) != 9)[None]}, "zeros after tokens in row 0: right padding"),
    "all pads": (lambda m: {"attention_mask": torch.zeros(1, 25)}, "row 0 of attention_mask is all pads"),
    "short mask": (lambda m: {"attention_mask": torch.ones(1, 24)}, "attention_mask has 24 columns for 25 tokens on 0"),
    "mask of two rows": (lambda m: {"attention_mask": torch.ones(2, 25)}, "attention_mask must be 2-D with 1 rows"),
    "4-D mask": (lambda m: {"attention_mask": torch.ones(1, 1, 25, 25)}, "attention_mask must be 2-D with 1 rows"),
    "DynamicCache": (
        lambda m: {"past_key_values": DynamicCache()},
        r"past_key_values is a DynamicCache; .*kv.new_cache\(\)",
    ),
    "DynamicCache, new name": (lambda m: {"cache": DynamicCache()}, r"is a DynamicCache; .*kv.new_cache\(\)"),
    "StaticCache": (
        lambda m: {"past_key_values": StaticCache(config=m.config, max_cache_len=64)},
        r"past_key_values is a StaticCache; .*kv.new_cache\(\)",
    ),
    "legacy tuple": (lambda m: {"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}, "past_key_values is a tuple"),
}


@pytest.mark.parametrize("case", CALLS)
def test_generate_with_the_argument(model, case):
    make, message = CALLS[case]
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, message):
        model.generate(QUESTION, **GREEDY, **make(model))


def test_generate_with_embeddings_alone(model):
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, "needs ids, not inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 5, 32), **GREEDY)


BAD_IDS = {
    "float": (
        lambda: TEXT.float(),
        r"must be an integer tensor \[rows, n\]; given: a torch.float32 tensor of shape \(1, 175\)",
    ),
    "1-D": (lambda: TEXT[0], r"must be an integer tensor \[rows, n\]; given: a torch.int64 tensor of shape \(175,\)"),
    "3-D": (lambda: TEXT[None], r"must be an integer tensor \[rows, n\]; given: .*\(1, 1, 175\)"),
    "list": (lambda: [[5, 6, 7]], r"must be an integer tensor \[rows, n\]; given: \[\[5, 6, 7\]\]"),
    "bool": (lambda: TEXT > 50, r"must be an integer tensor \[rows, n\]; given: a torch.bool tensor"),
    "empty": (lambda: TEXT[:, :0], "the prompt is empty: at least one token is needed"),
    "no rows": (lambda: TEXT[:0], "the batch is empty: at least one row is needed"),
    "beyond the vocabulary": (lambda: torch.tensor([[5, 97]]), "97.*vocabulary|vocabulary.*97"),
    "negative": (lambda: torch.tensor([[5, -1]]), "-1.*vocabulary|vocabulary.*-1"),
}


@pytest.mark.parametrize("call", ["generate", "forward", "generate on a cache"])
@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(model, answer, case, call):
    make, message = BAD_IDS[case]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with idle(model), refused((Unsupported, ValueError), message):
            if call == "forward":
                model(make())
            else:
                model.generate(make(), past_key_values=cache if "cache" in call else None, **GREEDY)
        assert_still_serves(model, kv, cache, answer)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_no_ids(model, call):
    with kvtier.offload(model, settings()), idle(model), refused((Unsupported, ValueError), "ids"):
        model.generate(**GREEDY) if call == "generate" else model()


def test_ids_given_twice(model):
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, "give the prompt's token ids once"):
        model.generate(TEXT, input_ids=TEXT, **GREEDY)


PREFILL = {
    "empty list": ([], "the prompt is empty"),
    "empty": (TEXT[:, :0], "the prompt is empty"),
    "no rows": (TEXT[:0], "the batch is empty"),
    "float": (TEXT[0].float(), "integer tensor"),
    "list of floats": ([1.0, 2.0], "integer tensor"),
    "3-D": (TEXT[None], "integer tensor"),
    "beyond the vocabulary": ([5, 97], "97.*vocabulary|vocabulary.*97"),
}


@pytest.mark.parametrize("case", PREFILL)
def test_bad_ids_of_a_prefill(model, case):
    ids, message = PREFILL[case]
    with kvtier.offload(model, settings()) as kv, idle(model), refused((Unsupported, ValueError), message):
        kv.prefill(ids)


@pytest.mark.parametrize("ids", ["abc", None, 5, {"input_ids": [1]}, ["x"]], ids=str)
def test_a_prefill_of_something_else(model, ids):
    with (
        kvtier.offload(model, settings()) as kv,
        idle(model),
        refused(Unsupported, "prefill takes token ids, a tensor"),
    ):
        kv.prefill(ids)


@pytest.mark.parametrize("wrong", ["x", 1.5, True], ids=str)
def test_numbers_that_are_none(model, wrong):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with refused(ValueError, r"select must be 0 .. \d+ \(\[attention\] select\), not"):
            cache.fork(select=wrong)
        with refused(Unsupported, r"it takes 1 row and makes >= 1"):
            cache.fork(rows=wrong)
        with refused(ValueError, "a cache has at least one row, not"):
            kv.new_cache(wrong)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_batch_on_a_cache_of_one_row(model, answer, call):
    message = r"input_ids has 2 rows, the cache 1: use kv.new_cache\(rows=2\), or fork\(rows=2\)"
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with idle(model), refused(Unsupported, message):
            getattr(model, call)(TEXT.repeat(2, 1), past_key_values=cache)
        assert_still_serves(model, kv, cache, answer)


@pytest.mark.parametrize("where", [0, 50, 174])
def test_a_pad_token_without_a_mask(model, where):
    ids = TEXT.clone()
    ids[0, where] = PAD
    message = r"contains the pad token 0 and no attention_mask: pass the tokenizer's, or, if .*torch.ones_like\(ids\)"
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, message):
        model.generate(ids, **GREEDY)


def test_a_pad_token_given_for_this_call(model):
    message = rf"the prompt contains the pad token {TEXT[0, 7]} and no attention_mask"
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, message):
        model.generate(TEXT, pad_token_id=TEXT[0, 7].item(), **GREEDY)


def test_a_pad_token_that_is_an_end_token_is_no_padding(model, answer):
    """As in stock generate: models without a pad token use their end token."""
    with kvtier.offload(model, settings()):
        out = model.generate(TEXT, pad_token_id=TEXT[0, 7].item(), eos_token_id=[TEXT[0, 7].item(), 96], **GREEDY)
    assert out[0, 175] == answer[0][0]


# -- what forward is asked for ----------------------------------------------------------------------------------------


FORWARD = {
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 5, 32)}, "inputs_embeds: kvtier keeps token ids"),
    "labels": ({"labels": QUESTION}, "labels: training losses are not supported"),
    "attentions": ({"output_attentions": True}, "output_attentions: kvtier never has the whole attention matrix"),
    "hidden_states": ({"output_hidden_states": True}, "output_hidden_states: only the last block's"),
    "no-cache": ({"use_cache": False}, "use_cache=False: an offload block is the cache"),
    "right padding": ({"attention_mask": (torch.arange(25) < 20)[None]}, "zeros after tokens in row 0: right padding"),
    "4-D mask": ({"attention_mask": torch.ones(1, 1, 25, 25)}, "attention_mask must be 2-D with 1 rows"),
    "positions": (
        {"position_ids": torch.arange(3, 28)[None]},
        r"position_ids must be 0 .. 24 \(kvtier gives positions",
    ),
    "short positions": ({"position_ids": torch.arange(5)[None]}, r"position_ids must be 0 .. 24"),
    "DynamicCache": ({"past_key_values": DynamicCache()}, r"past_key_values is a DynamicCache; .*kv.new_cache\(\)"),
    "DynamicCache, new name": ({"cache": DynamicCache()}, r"is a DynamicCache; .*kv.new_cache\(\)"),
    "indices to keep": ({"logits_to_keep": torch.tensor([3, 4])}, "logits_to_keep must be a number"),
    "packing": (
        {"cu_seq_lens_q": torch.tensor([0, 25])},
        "the argument cu_seq_lens_q of model.forward is not supported",
    ),
}


@pytest.mark.parametrize("case", FORWARD)
def test_forward_with_the_argument(model, case):
    arguments, message = FORWARD[case]
    with kvtier.offload(model, settings()), idle(model), refused(Unsupported, message):
        model(QUESTION, **arguments)


def test_positions_that_do_not_follow_the_cache(model):
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with idle(model), refused(Unsupported, r"position_ids must be 150 .. 174"):
            model(QUESTION, past_key_values=cache, position_ids=torch.arange(25)[None])


INNER = {
    "base model": lambda m, ids, c: m.model(ids),
    "base model, use_cache": lambda m, ids, c: m.model(ids, use_cache=True),
    "base model, no cache": lambda m, ids, c: m.model(ids, use_cache=False),
    "base model, our cache": lambda m, ids, c: m.model(ids, **{CACHE_NAME: c}, use_cache=True),
    "layer": lambda m, ids, c: m.model.layers[0](
        m.model.embed_tokens(ids), position_embeddings=m.model.rotary_emb(m.model.embed_tokens(ids), ids)
    ),
    "the class's forward": lambda m, ids, c: type(m).forward(m, ids),
    "the class's forward, our cache": lambda m, ids, c: type(m).forward(m, ids, **{CACHE_NAME: c}),
}


@pytest.mark.parametrize("case", INNER)
def test_an_inner_module(model, answer, case):
    message = r"call model\(...\) or model.generate\(...\)"
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with refused(Unsupported, message):
            INNER[case](model, QUESTION, cache)
        assert_still_serves(model, kv, cache, answer)


CACHE_METHODS = {
    "crop": (lambda c: c.crop(10), "cannot be cropped"),
    "reset": (lambda c: c.reset(), "cannot be reset"),
    "reorder": (lambda c: c.reorder_cache(torch.tensor([0])), "cannot be reordered"),
    "repeat": (lambda c: c.batch_repeat_interleave(2), r"use fork\(rows=...\)"),
    "select": (lambda c: c.batch_select_indices(torch.tensor([0])), r"not selected in place: use row\(i\)"),
    "record": (lambda c: c.activate_past_recording(), "assisted decoding is not supported"),
}


@pytest.mark.parametrize("case", CACHE_METHODS)
def test_cache_methods_that_cannot_work(model, answer, case):
    call, message = CACHE_METHODS[case]
    with kvtier.offload(model, settings()) as kv:
        cache = kv.prefill(BOOK)
        with refused(Unsupported, message):
            call(cache)
        assert_still_serves(model, kv, cache, answer)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_cache_of_another_block(model, call):
    other = tiny_llama(seed=1)
    message = "this cache belongs to another offload block: its chunks are not in this one"
    with kvtier.offload(other, settings()) as theirs, kvtier.offload(model, settings()):
        cache = theirs.prefill(BOOK)
        with idle(model), refused(Unsupported, message):
            getattr(model, call)(QUESTION, past_key_values=cache)


# -- configuration ----------------------------------------------------------------------------------------------------


CONFIG = {
    "unknown section": ({"budgets": {"gpu": "1GiB"}}, r'\[budgets\] is an unknown section, did you mean "budget"\?'),
    "unknown key": ({"budget": {"gpus": "1GiB"}}, r'\[budget\] gpus is an unknown key, did you mean "gpu"\?'),
    "key of another section": (
        {"attention": {"block": 4}},
        r"\[attention\] block is an unknown key, it belongs to \[prefill\]",
    ),
    "wrong unit": ({"budget": {"gpu": "6GB"}}, r'\[budget\] gpu = "6GB" is not a size; write "6GiB"'),
    "no unit": ({"budget": {"host": "48"}}, r'\[budget\] host = "48" is not a size; write for example "6GiB"'),
    "share above all": ({"budget": {"gpu": "120%"}}, r'\[budget\] gpu = "120%": a share is above 0% and at most 100%'),
    "negative": ({"budget": {"gpu": -1}}, r"\[budget\] gpu = -1: a size is at least 1 byte"),
    "text for a number": (
        {"attention": {"sink": "4"}},
        r'\[attention\] sink = "4" is a str: a whole number is expected',
    ),
    "zero chunk": ({"attention": {"chunk": 0}}, r"\[attention\] chunk = 0 is too small: it is at least 1"),
    "unknown method": (
        {"attention": {"method": "paper"}},
        r'method = "paper" is not a choice.* "chunks", "reattention"',
    ),
    "unknown kind": ({"summary": {"kind": "sketsh"}}, r'kind = "sketsh" is not a choice, did you mean "sketch"\?'),
    "no such bits": ({"summary": {"bits": 3}}, r"bits = 3 is not a choice; choose one of 2, 4, 8"),
    "disk without a store": (
        {"budget": {"disk": "1GiB"}},
        r"\[budget\] disk = 1GiB has no store .* set \[store\] path",
    ),
    "max above the window": (
        {"attention": {"max": 1024}},
        r"\[attention\] max = 1024 exceeds the model's trained window of 512: lower it to 512 or less",
    ),
    "too much selected": (
        {"attention": {"sink": 4, "select": 60, "chunk": 8, "local": 16}, "prefill": {"block": 32}},
        r"sink 4 \+ select 60 x chunk 8 \+ local 16 \+ chunk - 1 \+ block 32 = 539 > \[attention\] "
        r"max 512; lower .*select to 56",
    ),
    "block too large": ({"prefill": {"block": 500}}, r"block 500 = \d+ > \[attention\] max 512; lower sink, chunk or"),
    "tail above block": (
        {"prefill": {"block": 32, "tail": 40}},
        r"\[prefill\] tail = 40 is longer than a block of 32 tokens: lower tail to 32",
    ),
    "rank above head_dim": (
        {"summary": {"rank": 32}},
        r"\[summary\] rank = 32 is above the model's head_dim 16: lower it",
    ),
}


@pytest.mark.parametrize("case", CONFIG)
def test_configuration(model, case):
    config, message = CONFIG[case]
    with refused(kvtier.ConfigError, message):
        kvtier.offload(model, config)


def test_a_missing_configuration_file(model, tmp_path):
    path = tmp_path / "nothing.toml"
    with refused(kvtier.ConfigError, rf"no configuration file at {path}: give the path of a TOML file, a dict"):
        kvtier.offload(model, str(path))


def test_an_unknown_key_in_a_file_names_the_file(model, tmp_path):
    path = tmp_path / "kvtier.toml"
    path.write_text("[attention]\nsinks = 4\n")
    with refused(kvtier.ConfigError, rf'{path}: \[attention\] sinks is an unknown key, did you mean "sink"\?'):
        kvtier.offload(model, path)


def test_a_file_that_is_no_toml(model, tmp_path):
    path = tmp_path / "kvtier.toml"
    path.write_text("[attention]\nsink: 4\n")
    with refused(kvtier.ConfigError, rf"{path}, line 2: not valid TOML"):
        kvtier.offload(model, path)


def test_a_durable_store_without_a_place(model):
    message = r'\[store\] mode = "durable" needs \[store\] path: a directory to keep sequences in'
    with refused(kvtier.ConfigError, message):
        kvtier.offload(model, settings(store={"mode": "durable"}))


@pytest.mark.parametrize(
    "store", [{"mode": "durable"}, {"dtype": "int8"}, {"dtype": "int4"}], ids=["durable", "int8", "int4"]
)
def test_a_store_for_the_papers_rule(model, tmp_path, store):
    """It keeps everything on the device, so there is nothing to write or to quantise."""
    (key, value), *_ = store.items()
    message = rf'\[store\] {key} = "{value}" does not go with \[attention\] method = "reattention".*: use method'
    with refused(Unsupported, message):
        paper = {"method": "reattention"}
        kvtier.offload(model, settings(attention=paper, store={"path": str(tmp_path / "store"), **store}))
    assert not (tmp_path / "store").exists()


# -- budgets ----------------------------------------------------------------------------------------------------------


KINDS = ["sketch", "exact"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpu", "host"])
def test_a_budget_below_the_minimum(model, name, kind):
    message = rf"\[budget\] {name} = 1.00 KiB is below the minimum working set .*window.*Raise it to at least \d+ bytes"
    with refused(kvtier.BudgetError, message):
        kvtier.offload(model, settings(kind=kind, budget={name: "1KiB"}))


@pytest.mark.parametrize("name", ["gpu", "host"])
def test_a_byte_below_the_minimum_is_refused(model, name):
    config = settings()
    least = minimum_budget(model, config, name)
    with refused(kvtier.BudgetError, rf"at least {least} bytes"):
        kvtier.offload(model, {**config, "budget": {name: least - 1}})


@pytest.mark.parametrize("select", [0, 1, 40])
@pytest.mark.parametrize("block", [8, 32, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_the_named_minimum_is_enough(model, tmp_path, kind, block, select):
    """For one cache that is shorter than a slab of summaries: what the message promises."""
    config = settings(select=select, block=block, kind=kind)
    budget = {name: minimum_budget(model, config, name) for name in ("gpu", "host")}
    config = {**config, "budget": {**budget, "disk": "16MiB"}, "store": {"path": str(tmp_path / "store")}}
    ids = prompt(900)
    with kvtier.offload(model, config) as kv:
        cache = kv.prefill(ids)
        out = model.generate(ids, past_key_values=cache, **GREEDY)
        tiers = kv.stats()["tiers"]
    assert out.shape == (1, 908)
    assert all(tier["bytes"] <= tier["budget"] for tier in tiers.values())
    assert tiers["disk"]["chunks"] > 0


def test_each_further_slab_of_summaries_needs_what_the_message_says(model):
    """The minimum holds one slab a layer; a longer context says how much more it needs, and that is enough."""
    config = settings(select=20)
    ids = prompt(20 + 8 * (slabs.SLAB_CHUNKS + 20))
    budget = {"gpu": minimum_budget(model, config, "gpu"), "host": "64MiB"}
    for _ in range(model.config.num_hidden_layers):
        message = r"\[budget\] gpu = .* is too small: .* needed for the summaries of 128 more chunks of a layer"
        with refused(kvtier.BudgetError, message) as caught, kvtier.offload(model, {**config, "budget": budget}) as kv:
            kv.prefill(ids)
        budget["gpu"] += bytes_to_raise(caught.value)
    with kvtier.offload(model, {**config, "budget": budget}) as kv:
        assert kv.prefill(ids).get_seq_length() == ids.shape[1]


def bytes_to_raise(error):
    """The "by at least" of a message, rounded up to what its two decimals can hide."""
    number, unit = re.search(r"by at least ([\d.]+) (B|KiB|MiB)", str(error)).groups()
    factor = {"B": 1, "KiB": 2**10, "MiB": 2**20}[unit]
    return int((float(number) + (0.01 if factor > 1 else 0)) * factor)


@pytest.mark.parametrize("name", ["gpu", "host"])
def test_more_than_the_machine_has(model, name):
    with refused(kvtier.BudgetError, rf"\[budget\] {name} = 512.00 TiB, but only .* is available"):
        kvtier.offload(model, settings(budget={name: "512TiB"}))


def test_more_than_the_disk_has(model, tmp_path):
    config = settings(budget={"disk": "1048576TiB"}, store={"path": str(tmp_path / "store")})
    with refused(kvtier.BudgetError, r"\[budget\] disk = .* TiB, but only .* is available \(free on the disk of"):
        kvtier.offload(model, config)
    assert not (tmp_path / "store").exists()


@pytest.fixture
def small_slabs(monkeypatch):
    """Host slabs of 8 chunks: budgets of some 100 KiB behave as those of some GiB do."""
    monkeypatch.setattr(host_pool, "SLAB_BYTES", 8 * CHUNK_BYTES)


CHUNK_BYTES = 2 * 8 * 16 * 4
"""K and V, tokens, head_dim, bytes: one chunk of one head of ``tiny_llama()`` with ``settings()``."""
LONG = prompt(6000, seed=9)


def read_until_full(model, cache, message, error=kvtier.BudgetError):
    """Reading a long text into ``cache`` stops with ``message``; only cycles keep the cache alive afterwards."""
    with refused(error, message) as caught:
        model(LONG, past_key_values=cache, logits_to_keep=1)
    del caught


def budgets(model, path=None, disk=None, host=4):
    """Plenty of device, ``host`` times the least host budget, a store if there is a path."""
    config = settings()
    config["budget"] = {"gpu": "64MiB", "host": host * minimum_budget(model, config, "host")}
    if path:
        config["budget"]["disk"] = disk
        config["store"] = {"path": str(path / "store")}
    return config


HOST_FULL = (
    r"\[budget\] host = .* is full: .* in use.*, and \d+ .*chunks of 1.00 KiB .*"
    r"Raise \[budget\] host, .*give a disk tier with \[store\] path and \[budget\] disk"
)
DISK_FULL = r"\[budget\] disk = 1.00 MiB is too small: .* in use, .* needed .*Raise \[budget\] disk by at least"


def test_the_host_is_full_and_there_is_no_store(model, answer, small_slabs):
    with kvtier.offload(model, budgets(model)) as kv:
        book = kv.prefill(BOOK)
        fork = book.fork()
        read_until_full(model, fork, HOST_FULL)
        del fork
        gc.collect()
        assert_still_serves(model, kv, book, answer)


def test_the_disk_budget_is_full_in_the_middle_of_a_prefill(model, answer, tmp_path, small_slabs):
    with kvtier.offload(model, budgets(model, tmp_path, "1MiB")) as kv:
        book = kv.prefill(BOOK)
        fork = book.fork()
        read_until_full(model, fork, DISK_FULL)
        assert kv.stats()["tiers"]["disk"]["chunks"] > 0
        del fork
        gc.collect()
        assert_still_serves(model, kv, book, answer)


@pytest.mark.parametrize("disk", [None, "1MiB"], ids=["no store", "full store"])
def test_an_earlier_fork_answers_while_the_cache_that_met_a_full_tier_is_kept(
    model, answer, tmp_path, small_slabs, disk
):
    """``except BudgetError as error`` keeps the frames, and with them the cache, alive.

    Bytes for two parked windows are set aside: chunks must not take their place. The earlier fork can then run and
    answer from what it holds; new chunks find no room before the other cache is gone.
    """
    config = budgets(model, tmp_path if disk else None, disk)
    with kvtier.offload(model, config) as kv:
        book = kv.prefill(BOOK)
        kept = book.fork()
        read_until_full(model, kept, DISK_FULL if disk else HOST_FULL)
        first = model.generate(BOOK, past_key_values=book.fork(), do_sample=False, max_new_tokens=1)
        assert kept.get_seq_length() > 150
        del kept
        gc.collect()
        assert_still_serves(model, kv, book, answer)
    assert first.tolist() == model.generate(BOOK, do_sample=False, max_new_tokens=1).tolist()


def test_a_window_is_parked_in_what_the_chunks_do_not_use(model, answer):
    """64 KiB of chunks and a window of 11 KiB fit 158 KiB, even if the host pool has allocated it all in one slab."""
    with kvtier.offload(model, budgets(model)) as kv:
        book = kv.prefill(BOOK)
        fork = book.fork()
        assert_still_serves(model, kv, fork, answer)


def test_more_forks_than_the_host_budget_holds(model, answer, small_slabs):
    with kvtier.offload(model, budgets(model)) as kv:
        book = kv.prefill(BOOK)
        with refused(kvtier.BudgetError, r"\[budget\] host = ") as caught:
            forks = []
            for _ in range(50):
                forks.append(book.fork())
                model(QUESTION, past_key_values=forks[-1])
        del caught, forks
        gc.collect()
        assert_still_serves(model, kv, book, answer)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_device_of_the_store_is_full_in_the_middle_of_a_prefill(model, answer, tmp_path, small_slabs, monkeypatch):
    with kvtier.offload(model, budgets(model, tmp_path, "8MiB")) as kv:
        book = kv.prefill(BOOK)
        kv.prefill(prompt(800, seed=4))
        fork = book.fork()
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", no_space)
            message = rf"{tmp_path}/store.*: the device is full: .* Nothing stored is damaged. Free space there, lower"
            read_until_full(model, fork, message, kvtier.StoreError)
            assert 150 < fork.get_seq_length() < 150 + LONG.shape[1]
            del fork
            gc.collect()
            assert_still_serves(model, kv, book.fork(), answer)
        read_until_full(model, kv.prefill(BOOK), r"\[budget\] (disk|host|gpu)")  # it is used again
        gc.collect()
        assert_still_serves(model, kv, book, answer)


def test_a_prefill_that_failed_goes_on_when_there_is_room_again(model, tmp_path, monkeypatch):
    """What was read before the device was full is kept; the rest follows, and the result is that of one go."""
    ids, config = prompt(420, seed=2), budgets(model, tmp_path, "8MiB", host=1)
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
    with kvtier.offload(model, config) as kv:
        cache = kv.prefill(ids[:, :40])
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", no_space)
            with refused(kvtier.StoreError, "the device is full"):
                model(ids[:, 40:], past_key_values=cache)
        done = cache.get_seq_length()
        assert cache.token_ids.tolist() == ids[0, :done].tolist()
        logits = model(ids[:, done:], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


# -- the store's path -------------------------------------------------------------------------------------------------


def a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("not a folder")
    return path


PATHS = {
    "a file": (a_file, r"\[store\] path = .*file is a file, expected a folder"),
    "below a file": (lambda tmp: a_file(tmp) / "store", r"\[store\] path = .*: there is no folder"),
    "no parent": (lambda tmp: tmp / "mount" / "store", r"there is no folder .*mount. Create it, or mount it"),
    "/proc": (lambda tmp: "/proc/kvtier", r"\[store\] path = /proc/kvtier|only 0 B .*/proc/kvtier"),
}


@pytest.mark.parametrize("case", PATHS)
def test_a_store_path_that_cannot_be_written(model, tmp_path, case):
    make, message = PATHS[case]
    config = settings(store={"path": str(make(tmp_path))})
    error = (kvtier.StoreError, kvtier.BudgetError)
    with refused(error, message), kvtier.offload(model, config), idle(model):
        pytest.fail("the block was entered")


def test_a_store_path_without_permission(model, tmp_path, monkeypatch):
    """Permissions do not bind root, so the system call is made to fail."""

    def denied(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "mkdir", denied)
    config = settings(store={"path": str(tmp_path / "store")})
    message = r"\[store\] path = .*store cannot be used: .*Permission denied.* Choose another \[store\] path"
    with refused(kvtier.StoreError, message), kvtier.offload(model, config):
        pytest.fail("the block was entered")


def test_a_store_path_in_use_by_other_zarr_data(model, tmp_path):
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with refused(kvtier.StoreError, "holds zarr data that kvtier did not write"):
        kvtier.offload(model, settings(store={"path": str(tmp_path)})).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["zarr.json"]
