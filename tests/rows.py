"""Batches, the rows that they are made of and models to run them: what the tests of batches and generate share."""

import contextlib
import functools

import torch
from models import PAD, settings, tiny_config, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

import kvtier

WORDS = 1009
"""Vocabulary of the models here."""
GREEDY = {"do_sample": False, "max_new_tokens": 12}
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
FEW = settings(select=3)
"""Three chunks of 8 tokens: rows of more than 52 tokens have chunks that are not attended."""

REATTENTION = settings(select=3, local=32, attention={"method": "reattention"})
CASES = {"llama": ("llama", FEW), "gemma3": ("gemma3", FEW), "reattention": ("llama", REATTENTION)}


def tiny_gemma3():
    """A hybrid: layers with a sliding window of 24 tokens between full ones, two sets of rotary frequencies."""
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    own = {
        name: getattr(tiny_config(vocab_size=WORDS), name)
        for name in (*shared, "head_dim", "pad_token_id", "bos_token_id")
    }
    kinds = ["sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **own,
        num_hidden_layers=2,
        max_position_embeddings=512,
        sliding_window=24,
        layer_types=kinds,
        initializer_range=0.1,
        eos_token_id=None,
        attn_implementation="sdpa",
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(kinds, (1e3, 1e6), strict=True)
        },
    )
    return AutoModelForCausalLM.from_config(config).eval()


MAKERS = {"llama": lambda: tiny_llama(vocab_size=WORDS), "gemma3": tiny_gemma3}


@functools.cache
def model_of(family):
    """A model that tests share: each leaves it as it was."""
    return MAKERS[family]()


def tokenizer():
    """Words "w0005" .. "w1008" of these token ids and five others; pads on the left; a chat template."""
    others = ["<pad>", "<s>", "</s>", "<unk>", "abcdef"]  # the last is what StopStringCriteria begins with
    words = {word: i for i, word in enumerate([*others, *(f"w{i:04}" for i in range(5, WORDS))])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.padding_side = "left"
    made.chat_template = "{% for message in messages %}<s> {{ message.content }} {% endfor %}"
    return made


# -- batches ----------------------------------------------------------------------------------------------------------


def texts(*lengths, seed=50):
    """One text [n] per length, each of n different tokens: equal tokens would have equal keys and scores in layer 0."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(lengths))]
    return [1 + torch.randperm(WORDS - 1, generator=g)[:n] for g, n in zip(generators, lengths, strict=True)]


def padded(rows, extra=0, pad=PAD):
    """``rows`` [n] as ids [R, longest + extra], padded on the left, and their mask."""
    columns = max(len(row) for row in rows) + extra
    ids = torch.stack([torch.cat((torch.full((columns - len(row),), pad), row)) for row in rows])
    mask = torch.stack([torch.arange(columns) >= columns - len(row) for row in rows]).long()
    return ids, mask


def stored(cache):
    """The token ids of each row of a cache, without touching it."""
    return [sequence.tokens.array().tolist() for sequence in cache._lane.sequences]


def lists(rows):
    return [row.tolist() for row in rows]


def generate(model, rows, steps=12, extra=0, **arguments):
    """Greedy new tokens [R, steps] and logits [R, steps, V] of ``rows``."""
    ids, mask = padded(rows, extra)
    options = {"do_sample": False, "max_new_tokens": steps, **DETAILS} | arguments
    out = model.generate(ids, attention_mask=mask, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


def forward(model, rows, cache=None, extra=0, **arguments):
    """Logits of the real tokens of each of ``rows``, [n, V] per row."""
    ids, mask = padded(rows, extra)
    logits = model(ids, attention_mask=mask, past_key_values=cache, **arguments).logits
    return [logits[i, mask[i].bool()] for i in range(len(rows))]


def stock_logits(family, text):
    """Logits [n, V] of a model that never was in a block."""
    with torch.no_grad():
        return pristine(family)(text[None]).logits[0]


@functools.cache
def pristine(family):
    return MAKERS[family]()


def last(logits):
    """The last token's logits [R, V] of what ``forward`` returns."""
    return torch.stack([row[-1] for row in logits])


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def key(config):
    return tuple((section, tuple(values.items())) for section, values in config.items())


@functools.cache
def _alone(family, config, row, steps):
    with kvtier.offload(pristine(family), {section: dict(values) for section, values in config}) as kv:
        del kv
        tokens, logits = generate(pristine(family), [torch.tensor(row)], steps)
    return tokens[0], logits[0]


def alone(family, config, row, steps=12):
    """Greedy tokens [steps] and logits [steps, V] of one row in a block of its own."""
    return _alone(family, key(config), tuple(row.tolist()), steps)


def assert_rows_as_alone(family, config, rows, tokens, logits):
    for row, got, scores in zip(rows, tokens, logits, strict=True):
        expected = alone(family, config, row, len(got))
        assert got.tolist() == expected[0].tolist(), f"row of {len(row)}"
        close(scores, expected[1])


# -- what a block holds -----------------------------------------------------------------------------------------------


def held(kv):
    """Bytes and chunks of each tier, and the number of seats on the device."""
    tiers = {name: (tier["bytes"], tier["chunks"]) for name, tier in kv.stats()["tiers"].items()}
    seats = getattr(kv._runtime.engine, "_seats", None)
    return tiers, seats and len(seats._seats)


def window_bytes(model, config):
    """Device bytes of one seat."""
    with kvtier.offload(model, config) as kv:
        return kv._runtime.engine._seats._bytes


@contextlib.contextmanager
def failing(model, *at, layer=1, error=RuntimeError):
    """A layer raises before its calls number ``at`` (from 1)."""
    calls = iter(range(1, 10**6))

    def hook(module, args):
        if next(calls) in at:
            raise error("in the middle of a forward")

    handle = model.model.layers[layer].register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def fed_blocks(kv):
    """Record the shape of the ids of every forward of the model: a list that grows."""
    shapes, original = [], kv._forward

    @functools.wraps(original)
    def record(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return original(*args, **kwargs)

    kv._forward = record
    return shapes


def chosen(kv):
    """Largest number of chunks that the last block attended to in any layer."""
    return max((c.shape[1] for c in kv._runtime.engine.last_chosen if c is not None), default=0)
