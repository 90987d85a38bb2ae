"""NaN and infinity in what a model computes: refused before they become summaries or chunks, whichever those are."""

import contextlib
import gc

import pytest
import torch
from models import assert_untouched, fingerprint, prompt, settings, tiny_llama

import kvtier
from kvtier.runtime.finite import check_finite

BAD = 96
"""A token; ``text`` holds it only where it is put."""
KINDS = ["sketch", "cuboid", "minmax", "mean", "exact"]
GREEDY = {"do_sample": False, "max_new_tokens": 8}
HEAD_DIM = 16


def text(n, bad=None, seed=0):
    ids = prompt(n, seed)
    ids[ids == BAD] = 1
    if bad is not None:
        ids[0, bad] = BAD
    return ids


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@contextlib.contextmanager
def broken(model, what, factor=torch.nan, *, layer=1, head=1):
    """In one layer and head, the ``what`` (q, k or v) of every token BAD are multiplied by ``factor``."""
    seen = {}
    columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)

    def look(module, arguments):
        seen["bad"] = arguments[0] == BAD

    def spoil(module, arguments, out):
        out = out.clone()
        out[..., columns] = torch.where(seen["bad"][..., None], out[..., columns] * factor, out[..., columns])
        return out

    projection = getattr(model.model.layers[layer].self_attn, f"{what}_proj")
    hooks = [model.model.embed_tokens.register_forward_pre_hook(look), projection.register_forward_hook(spoil)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def refused(what, head=1, layer=1, advice="Look for NaN in the model's weights"):
    said = f"^the {what} of layer {layer} hold NaN or infinity, in KV head {head}: .*{advice}.*other caches can"
    return pytest.raises(kvtier.KvtierError, match=said)


def config(kind="sketch", dtype="auto"):
    return settings(kind=kind, select=3, store={"dtype": dtype})


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "auto") for kind in KINDS), ("sketch", "int8"), ("sketch", "int4"), ("exact", "int4")]
)
@pytest.mark.parametrize("factor", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_chunk_is_refused_where_it_leaves_the_window(model, kind, dtype, what, factor):
    """The first one, to which the summary would be fitted, and a later one."""
    with kvtier.offload(model, config(kind, dtype)) as kv, broken(model, what[0], factor):
        for bad in (5, 130):
            with refused(what):
                kv.prefill(text(300, bad))


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_still_in_the_window_are_not_fitted_to(model, kind):
    """The first block that can select chunks begins at token 32: 20 is in the window then."""
    with kvtier.offload(model, config(kind)) as kv, broken(model, "k"), refused("keys"):
        kv.prefill(text(40, 20))


@pytest.mark.parametrize("factor", [torch.nan, torch.inf, 1e30])
def test_queries_that_a_sketch_would_be_fitted_to(model, factor):
    """Also those that are too large to be squared; of query head 3, which KV head 1 serves."""
    with kvtier.offload(model, config()) as kv, broken(model, "q", factor, head=3), refused("queries"):
        kv.prefill(text(100, 20))


def test_while_generating(model):
    """The question's last token but one leaves the window after some steps; until then it is attended as it is."""
    with kvtier.offload(model, config(dtype="int4")) as kv:
        book = kv.prefill(text(200))
        with broken(model, "v", torch.inf), refused("values"):
            model.generate(text(9, 7, seed=1), past_key_values=book, do_sample=False, max_new_tokens=60)


@pytest.mark.parametrize("what", ["k", "v"])
@pytest.mark.parametrize(("bad", "n"), [(1, 60), (15, 20)], ids=["sink", "window"])
def test_sinks_and_window_are_attended_as_they_are(model, what, bad, n):
    """NaN comes out of NaN, as in stock attention. Tokens before it are not looked at: masks differ in 0 x NaN."""
    ids = text(n, bad)
    with broken(model, what), torch.no_grad():
        expected = model(ids).logits[:, bad:]
        with kvtier.offload(model, settings()):  # all chunks are selected
            found = model(ids).logits[:, bad:]
    assert expected.isnan().any()
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_float16_overflows_where_float32_does_not():
    half, single = tiny_llama(dtype=torch.float16), tiny_llama()
    advice = "computed in float16, which ends at 65,504: load the model in bfloat16 or float32"
    with kvtier.offload(half, config()) as kv, broken(half, "k", 1e6), refused("keys", advice=advice):
        kv.prefill(text(100, 20))
    with kvtier.offload(single, config()) as kv, broken(single, "k", 1e6):
        kv.prefill(text(100, 20))


@pytest.mark.parametrize("bad", [20, 130])
def test_afterwards_all_is_as_before(model, bad):
    """The block serves other caches, the broken one is refused again, the model is untouched, all bytes go back."""
    before = fingerprint(model)
    with kvtier.offload(model, config()) as kv:
        book = kv.prefill(text(200))
        right = model.generate(text(9, seed=1), past_key_values=book.fork(), **GREEDY).tolist()
        cache = kv.new_cache()  # and frees what nobody holds
        residency = kv._runtime.engine.residency
        held = len(residency.host)
        with broken(model, "k"):
            for _ in range(2):
                with refused("keys"):
                    model.generate(text(300, bad), past_key_values=cache, **GREEDY)
        assert model.generate(text(9, seed=1), past_key_values=book.fork(), **GREEDY).tolist() == right
        del cache
        gc.collect()
        kv.new_cache()
        assert len(residency.host) == held > 0
    assert (residency.host.used_bytes, residency.device.used_bytes, len(residency.device.data)) == (0, 0, 0)
    assert_untouched(model, before)


def test_every_head_is_named():
    keys = torch.zeros(4, 3, 8)
    check_finite(0, torch.float32, keys=keys)
    keys[1, 2, 3], keys[3, 0, 0] = torch.nan, -torch.inf
    with pytest.raises(kvtier.KvtierError, match="layer 7 hold NaN or infinity, in KV heads 1, 3: "):
        check_finite(7, torch.float32, keys=keys)
