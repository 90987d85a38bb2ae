"""What kvtier takes from transformers without a promise: kvtier/compat.py alone, and it still is as relied upon."""

import ast
import functools
import importlib
import inspect
import math
import warnings
from pathlib import Path

import psutil
import pytest
import torch
import tqdm
import transformers
from models import CACHE_NAME, VOCAB, prompt, tiny_config, tiny_llama
from test_families import FAMILIES, model_of, tiny
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteriaList,
)

from kvtier import compat, families, generate
from kvtier.attention import HARMLESS, attention
from kvtier.cache import TieredCache, TieredLayer

ROOT = Path(__file__).resolve().parent.parent
MOVED = f"transformers {transformers.__version__} moved something that kvtier relies on: "


def moved(what, where="kvtier/compat.py"):
    """What a failed assertion says: what moved, and where kvtier relies on it."""
    return f"{MOVED}{what}. Look at {where}"


# -- the attention registry and the mask registry ----------------------------------------------------------------------


class Probe:
    """An attention function under a name of its own, without a mask function; remembers how it is called."""

    NAME = "kvtier-test-probe"

    def __init__(self, with_mask=False):
        self.calls = []
        AttentionInterface.register(self.NAME, self)
        if with_mask:
            self.NAME = "kvtier-test-probe-with-a-mask"
            AttentionInterface.register(self.NAME, self)
            AttentionMaskInterface.register(self.NAME, AttentionMaskInterface()["eager"])

    def __call__(self, module, query, key, value, attention_mask, **kwargs):
        self.calls.append((module, query, key, value, attention_mask, kwargs))
        out = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return out, None

    def run(self, model, ids, **arguments):
        """One forward of ``model`` through the probe; its config is put back."""
        name = compat.attention_name(model.config)
        compat.set_attention_name(model.config, self.NAME)
        try:
            with torch.no_grad():
                model(ids, **arguments)
        finally:
            compat.set_attention_name(model.config, name)
        return self.calls


PADDED = {"attention_mask": (torch.arange(12) >= 3).long()[None]}


def test_the_attention_name_that_compat_sets_is_the_one_that_layers_look_up():
    model = tiny_llama()
    assert compat.attention_name(model.config) == "sdpa", moved("config._attn_implementation_internal is not the name")
    calls = Probe().run(model, prompt(12))
    assert len(calls) == 2, moved("layers do not look up config._attn_implementation_internal in AttentionInterface")
    assert model.config._attn_implementation == "sdpa"
    compat.set_attention_name(model.config, "x")
    assert model.config._attn_implementation == "x", moved("_attn_implementation is not _attn_implementation_internal")
    compat.set_attention_name(model.config, None)
    assert compat.attention_name(model.config) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_built_for_a_name_without_a_mask_function(family):
    """Over a long context it would take the square of its length."""
    calls = Probe().run(model_of(family), prompt(12), **PADDED)
    assert {call[4] for call in calls} == {None}, moved("a mask is built for a name that is not registered for masks")


def test_the_probe_would_see_a_mask():
    calls = Probe(with_mask=True).run(tiny_llama(), prompt(12), **PADDED)
    assert all(isinstance(call[4], torch.Tensor) for call in calls)


PASSED = HARMLESS | set(inspect.signature(attention).parameters) | {"dropout", "sliding_window", "is_causal"}
"""Keyword arguments that kvtier's attention function knows. It refuses others at run time."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_function_gets_what_kvtier_expects(family):
    model = model_of(family)
    for module, query, key, value, _, kwargs in Probe().run(model, prompt(12)):
        n_heads = model.config.num_attention_heads
        n_kv_heads, head_dim = model.config.num_key_value_heads, query.shape[-1]
        shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
        expected = [(1, n_heads, 12, head_dim), *[(1, n_kv_heads, 12, head_dim)] * 2]
        assert shapes == expected, moved(f"shapes of q, k, v: {shapes}", "kvtier/attention.py")
        assert isinstance(kwargs.get("scaling"), float), moved("the argument scaling", "kvtier/attention.py")
        new = {name for name, argument in kwargs.items() if argument is not None and argument is not False} - PASSED
        assert not new, moved(f"{type(module).__name__} passes {new}", "kvtier/attention.py, _harmless")
        assert families._class_name(module) in families.FAMILIES


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma3", "gpt-oss", "cohere2"])
def test_the_key_of_the_attention_function_is_the_one_that_the_cache_returned(family):
    """The very object: kvtier marks it with the layer it belongs to."""
    returned = []

    class Marking(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            assert isinstance(layer_idx, int)
            returned.append(key_states.view(key_states.shape))
            return returned[-1], value_states

    calls = Probe().run(model_of(family), prompt(12), **{CACHE_NAME: Marking()}, use_cache=True)
    same = [call[2] is key for call, key in zip(calls, returned, strict=True)]
    assert all(same), moved("attention does not get the key that Cache.update returned", "kvtier/cache.py")


# -- names of arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_argument_has_one_of_the_names_that_compat_knows(family):
    parameters = inspect.signature(model_of(family).forward).parameters
    named = [name for name in compat.CACHE_NAMES if name in parameters]
    assert named == [CACHE_NAME], moved(f"the cache argument among {list(parameters)}")
    assert compat.cache_name(model_of(family).forward) == CACHE_NAME
    fed = {"input_ids", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}
    assert fed <= set(parameters), moved(f"forward lacks {fed - set(parameters)}", "kvtier/forward.py")


def test_the_cache_is_taken_under_either_name():
    for name in compat.CACHE_NAMES:
        arguments = {name: 3, "other": 4}
        assert compat.take_cache(arguments) == 3
        assert arguments == {"other": 4}
    assert compat.take_cache({"cache": None, "past_key_values": 3}) == 3
    assert compat.take_cache({}) is None


# -- rotary modules ----------------------------------------------------------------------------------------------------


def rotary_of(model):
    (module,) = [m for m in model.modules() if compat.is_rotary(m)]
    return module


def inverse_frequencies(theta, width):
    return theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)


@pytest.mark.parametrize("rope", ["default", "linear", "dynamic", "yarn", "llama3"])
def test_frequencies_are_those_that_the_rotary_module_was_made_with(rope):
    model = tiny_llama(rope=rope)
    frequencies, scaling = compat.frequencies(rotary_of(model), None)
    plain = inverse_frequencies(1e4, 16)
    assert frequencies.shape == (8,), moved(f"{compat.FREQUENCIES} of a rotary module")
    expected = {"default": plain, "dynamic": plain, "linear": plain / 4}.get(rope, frequencies)
    torch.testing.assert_close(frequencies, expected, msg=moved(f"{compat.FREQUENCIES} of {rope}"))
    expected = 0.1 * math.log(4) + 1 if rope == "yarn" else 1.0
    assert scaling == pytest.approx(expected), moved("attention_scaling of a rotary module")


def test_frequencies_stay_when_a_dynamic_rope_changes_its_own():
    model = tiny_llama(rope="dynamic", window=32)
    rotary = rotary_of(model)
    before = compat.frequencies(rotary, None)[0].clone()
    model(prompt(200))
    assert not torch.equal(rotary.inv_freq, before), "the model did not stretch its rope: nothing was tested"
    assert torch.equal(compat.frequencies(rotary, None)[0], before), moved(f"{compat.FREQUENCIES} is not kept")


@pytest.mark.parametrize(("family", "head_dim"), [("gemma3", 16), ("olmo3", 8)])
def test_frequencies_of_each_kind_of_layer_where_they_differ(family, head_dim):
    model = model_of(family)
    for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e3)):
        frequencies, scaling = compat.frequencies(rotary_of(model), kind)
        expected = inverse_frequencies(theta, head_dim)
        torch.testing.assert_close(frequencies, expected, msg=moved(f"{compat.FREQUENCIES} of {kind} layers"))
        assert scaling == 1.0
    assert [compat.layer_type(model.config, i) for i in (0, 1)] == ["sliding_attention", "full_attention"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one_rotary_module_and_its_frequencies_are_found(family):
    model = model_of(family)
    found = [name for name, module in model.named_modules() if compat.is_rotary(module)]
    assert len(found) == 1, moved(f"rotary modules by their buffer {compat.FREQUENCIES}: {found}")
    for layer in range(model.config.num_hidden_layers):
        frequencies, _ = compat.frequencies(rotary_of(model), compat.layer_type(model.config, layer))
        assert 1 <= frequencies.numel() <= 8


@pytest.mark.parametrize("used", [12, 200], ids=["short", "long"])
@pytest.mark.parametrize("stretched", ["dynamic", "longrope"])
def test_a_rotary_module_is_found_after_the_model_was_used(stretched, used):
    """5.17 makes the frequencies in use and the original ones one tensor while a text is short."""
    if stretched == "dynamic":
        model = tiny_llama(rope="dynamic", window=32)
    else:
        kind, own = FAMILIES["phi3-longrope"]
        model = tiny(kind, **own)
    before = compat.frequencies(rotary_of(model), None)[0].clone()
    model(prompt(used))
    model(prompt(12))
    assert torch.equal(compat.frequencies(rotary_of(model), None)[0], before)


# -- attention modules -------------------------------------------------------------------------------------------------


def with_a_sliding_window(family):
    """The family's model, with a window shorter than the trained one where its config has such a setting."""
    kind, own = FAMILIES[family]
    has_one = "sliding_window" in own or kind in ("MixtralConfig", "Phi3Config", "Starcoder2Config")
    return tiny(kind, **{**own, "sliding_window": 24}) if has_one else model_of(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sliding_window_of_a_layer_is_the_one_that_it_passes_to_attention(family):
    model = with_a_sliding_window(family)
    for module, *_, kwargs in Probe().run(model, prompt(12)):
        where = model.config if families.FAMILIES[families._class_name(module)].window_in_config else module
        assert compat.sliding_window(where) == kwargs.get("sliding_window"), moved(
            f"{type(module).__name__} passes sliding_window={kwargs.get('sliding_window')}, kvtier reads "
            f"{compat.sliding_window(where)} from its {type(where).__name__}",
            "kvtier/compat.py, and window_in_config in kvtier/families.py",
        )


def test_some_layers_above_have_a_sliding_window():
    windows = {f: [c[5].get("sliding_window") for c in Probe().run(with_a_sliding_window(f), prompt(12))]
               for f in ("mistral", "mixtral", "phi3", "starcoder2", "gemma3", "cohere2")}  # fmt: skip
    assert windows.pop("gemma3") == windows.pop("cohere2") == [24, None, 24, None]
    assert all(window == [24, 24] for window in windows.values())


def test_layers_of_smollm3_say_whether_they_rotate():
    model = model_of("smollm3")
    says = [compat.uses_rope(layer.self_attn) for layer in model.model.layers]
    assert says == [bool(n) for n in model.config.no_rope_layers] == [True, False] * 2, moved("use_rope of SmolLM3")


def test_attention_modules_say_whether_they_are_causal():
    for bidirectional in (False, True):
        model = tiny("GemmaConfig", head_dim=8, use_bidirectional_attention=bidirectional)
        says = {compat.is_causal(layer.self_attn) for layer in model.model.layers}
        assert says == {not bidirectional}, moved("is_causal of attention modules")


# -- caches ------------------------------------------------------------------------------------------------------------


def test_a_cache_layer_implements_what_is_abstract_and_nothing_else_is():
    abstract = {"lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"}
    assert CacheLayerMixin.__abstractmethods__ == abstract, moved("abstract methods", "TieredLayer in kvtier/cache.py")
    assert abstract <= vars(TieredLayer).keys()


OVERRIDES = {
    TieredLayer: """update lazy_initialization get_seq_length get_mask_sizes get_max_length offload prefetch reset
        reorder_cache is_compileable is_croppable supports_early_init""",
    TieredCache: "crop activate_past_recording batch_repeat_interleave batch_select_indices",
}


@pytest.mark.parametrize("own", OVERRIDES)
def test_what_the_cache_overrides_still_exists(own):
    """An override under a name that transformers has dropped would never be called."""
    base, names = own.__mro__[1], set(OVERRIDES[own].split())
    gone = {name for name in names if not hasattr(base, name)}
    assert not gone, moved(f"{base.__name__} lacks {gone}", "kvtier/cache.py")
    assert names <= vars(own).keys()


TOUCHED = {"offload", "prefetch", "reset", "reorder_cache"}
"""Methods of a layer that work on its tensors ``keys`` and ``values``: kvtier's has none, so it overrides each."""


def test_every_method_of_a_layer_that_touches_its_tensors_is_overridden():
    methods = inspect.getmembers(CacheLayerMixin, inspect.isfunction)
    touching = {name for name, method in methods if "self.keys" in inspect.getsource(method)} - {"__init__", "__repr__"}
    assert touching == TOUCHED, moved(f"methods that touch keys: {touching}", "TieredLayer in kvtier/cache.py")
    assert touching <= vars(TieredLayer).keys()


def test_a_cache_hands_its_arguments_to_its_layers():
    """What ``TieredCache`` passes to ``Cache``, and what its layers get."""

    class Layer(TieredLayer):
        def __init__(self):
            CacheLayerMixin.__init__(self)

        def update(self, *args, **kwargs):
            return args

        def get_seq_length(self):
            return 7

    cache = Cache(layers=[Layer(), Layer()])
    key, value = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    returned = cache.update(key, value, 1)
    assert returned[0] is key, moved("Cache.update passes other keys to its layer", "kvtier/cache.py")
    assert returned[1] is value
    assert cache.get_seq_length() == 7
    assert cache.get_mask_sizes(3, 0) == (10, 0)


# -- generate ----------------------------------------------------------------------------------------------------------


def own_inputs(family):
    return type(model_of(family)).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation


def test_phi3_alone_prepares_inputs_of_its_own():
    """It drops the cache at the trained window, so kvtier puts the stock method in its place (``stock_inputs``)."""
    own = {families.FAMILIES[families._class_name(m)].name
           for f in FAMILIES if own_inputs(f)
           for m in model_of(f).modules() if type(m).__name__.endswith("Attention")}  # fmt: skip
    known = {f.name for f in families.FAMILIES.values() if f.stock_inputs}
    assert own == known == {"Phi-3"}, moved(f"families with inputs of their own: {own}", "kvtier/families.py")


KNOWN = {
    "served": """bad_words_ids begin_suppress_tokens bos_token_id diversity_penalty do_sample early_stopping
        encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id epsilon_cutoff eta_cutoff
        exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length
        max_new_tokens max_time min_length min_new_tokens min_p no_repeat_ngram_size num_return_sequences output_logits
        output_scores pad_token_id remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate
        sequence_bias stop_strings suppress_tokens temperature top_h top_k top_p typical_p watermarking_config""",
    "replaced": "prefill_chunk_size use_cache",
    "meaningless here": """cache_config compile_config continuous_batching_config decoder_start_token_id disable_compile
        low_memory max_cache_len transformers_version _commit_hash _from_model_config""",
    "assisted decoding alone": """assistant_confidence_threshold assistant_ensemble_weight assistant_lookbehind
        is_assistant max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule speculation_type
        target_lookbehind""",
    "refused by the cache": "use_mtp",
    "refused by transformers": "constraints force_words_ids",
}
"""Settings of ``GenerationConfig`` that kvtier does not refuse by name, and what becomes of them."""


def test_every_setting_of_generate_is_known():
    """A setting that a new version adds may be one that kvtier cannot serve: find out, then refuse it or add it."""
    refused = generate.ONE.keys() | generate.UNSET.keys()
    there = set(vars(GenerationConfig()))
    new = there - refused - set(" ".join(KNOWN.values()).split())
    assert not new, moved(f"new generation settings {new}", "kvtier/generate.py, and KNOWN in this file")
    assert refused <= there, moved(f"{refused - there} are gone: what replaced them?", "kvtier/generate.py")
    assert "prefill_chunk_size" in there, moved("prefill_chunk_size", "kvtier/generate.py, wrap_generate")


def test_every_argument_of_generate_is_known():
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "kwargs"}
    served = {"inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}
    harmless = {"synced_gpus", "streamer", "negative_prompt_attention_mask"}
    new = parameters - served - harmless - generate.UNSET_ARGUMENTS.keys()
    assert not new, moved(f"new arguments of generate {new}", "kvtier/generate.py, and this test")
    assert served <= parameters


def test_stopping_criteria_answer_for_each_row():
    """What ``EndOfRow`` builds on."""
    ids = torch.tensor([[1, 2], [1, 3], [1, 4]])
    ended = StoppingCriteriaList([EosTokenCriteria(3), lambda ids, scores, **_: ids[:, -1] == 4])(ids, None)
    assert ended.tolist() == [False, True, True], moved("stopping criteria", "EndOfRow in kvtier/generate.py")
    assert EosTokenCriteria([2, 4])(ids, None).tolist() == [True, False, True]


def test_a_forward_returns_logits_that_can_be_replaced():
    output = tiny_llama()(prompt(3))
    assert output.logits.shape == (1, 3, VOCAB)
    output["logits"] = torch.zeros(1)
    assert output.to_tuple()[0] is output.logits, moved("model outputs", "Feeding.output in kvtier/forward.py")
    assert output.logits.tolist() == [0.0]


# -- only public interfaces elsewhere ----------------------------------------------------------------------------------


COMPAT_ONLY = {"original_inv_freq", "attention_scaling", "sliding_window", "layer_types", "is_causal", "use_rope"}
"""Attributes of transformers' modules and configs that no documentation promises: compat.py alone reads them."""
OWN_OBJECTS = {"self", "shape", "_shape"}
"""What an own attribute may hang on, where transformers has one of the same name."""
DOCUMENTED = {
    transformers.PreTrainedModel: """config generation_config from_pretrained use_kernels named_modules training
        get_output_embeddings""",
    transformers.AutoModelForCausalLM: "from_config",
    transformers.PreTrainedConfig: "get_text_config is_encoder_decoder output_attentions output_hidden_states",
    transformers.GenerationMixin: "prepare_inputs_for_generation generate",
    transformers.PreTrainedTokenizerBase: "apply_chat_template chat_template",
    transformers.utils.logging: "disable_progress_bar",
    transformers.modeling_outputs.ModelOutput: "to_tuple",
    transformers.modeling_outputs.CausalLMOutputWithPast: "logits",
    transformers.LlamaConfig: """hidden_size max_position_embeddings num_attention_heads num_hidden_layers
        num_key_value_heads head_dim rope_parameters vocab_size""",
    transformers.MixtralConfig: "output_router_logits",
    transformers.Phi3Config: "original_max_position_embeddings",
}
"""Attributes of transformers' objects that kvtier reads anywhere, and whose they are."""


def sources():
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
            for folder in ("kvtier", "runtime", "kernels")
            for path in sorted((ROOT / folder).glob("*.py"))}  # fmt: skip


def defined_in(tree):
    """Names of attributes, methods, functions and fields that a file defines for its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef | ast.Module):
            for statement in node.body:
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                yield from (target.id for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.ClassDef):
            for slots in (s.value for s in node.body if isinstance(s, ast.Assign) and s.targets[0].id == "__slots__"):
                yield from ast.literal_eval(slots)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and receiver(node) == "self":
            yield node.attr
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            yield from (a.value.lstrip("-").replace("-", "_") for a in node.args if isinstance(a, ast.Constant))


@functools.cache
def own_names():
    return frozenset(name for text in sources().values() for name in defined_in(ast.parse(text)))


def root(node):
    """The first name of a chain of attributes: "torch" for ``torch.nn.Module``."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return getattr(node, "id", "")


def receiver(node):
    """The last name of what an attribute is taken from: "shape" for ``self.engine.shape.dtype``."""
    value = node.value
    return value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")


@functools.cache
def foreign_names():
    """Every attribute, private ones too, of what transformers and torch hand to kvtier."""
    named = [tiny_llama(), tiny_config(), GenerationConfig(), DynamicCache(), torch.zeros(1), torch, transformers]
    classes = (Cache, CacheLayerMixin, transformers.StoppingCriteria, torch.nn.Module, type(named[0].model.rotary_emb))
    modules = list(named[0].modules())
    return frozenset(name for thing in (*named, *classes, *modules) for name in dir(thing))


@functools.cache
def library_names():
    """Public attributes of modules that kvtier imports from elsewhere, and of all their classes."""
    things = (str, bytes, int, float, tuple, list, dict, set, slice, type, BaseException, torch.Tensor, torch.nn.Module)
    caught = warnings.WarningMessage("", UserWarning, "", 0)
    instances = (tqdm.tqdm(disable=True), psutil.virtual_memory(), caught)
    names = {name for thing in (*things, *instances) for name in dir(thing)}
    for text in sources().values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                imported = [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in imported:
                if (
                    name.split(".")[0] in ("transformers", "kvtier")
                    or importlib.util.find_spec(name.split(".")[0]) is None
                ):
                    continue
                module = importlib.import_module(name)
                names |= set(dir(module)).union(*(dir(c) for c in vars(module).values() if isinstance(c, type)))
    return frozenset(name for name in names if not name.startswith("_"))


def strings_that_name_attributes(node):
    """Of ``getattr(x, "name")`` and its kin; and every string that looks like a private name."""
    named = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr")
    if named and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        yield node.args[1].value
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
        yield node.value


def is_private(name):
    return name.isidentifier() and name.startswith("_") and not name.startswith("__")


def trespasses(text):
    """What a file of kvtier/ takes from transformers or torch that is private, undocumented or not exported."""
    tree = ast.parse(text)
    imports = [a for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    modules = {(a.asname or a.name).split(".")[0]: a.name for a in imports}
    found = [a.name for a in imports if a.name.startswith("transformers.") or "._" in a.name]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{a.name}" for a in node.names if not may_be_imported(node.module or "", a.name)]
        if isinstance(node, ast.Attribute) and is_foreign(node, modules):
            found.append(ast.unparse(node))
        for name in strings_that_name_attributes(node):
            known = own_names() - foreign_names() if is_private(name) else documented() - COMPAT_ONLY
            found += [name] * (name not in known and "kvtier" not in name)
    return sorted(set(found))


def documented():
    return {name for names in DOCUMENTED.values() for name in names.split()}


def may_be_imported(module, name):
    if module.split(".")[0] == "transformers":
        return name in transformers.__all__ or (module, name) == ("transformers.utils", "logging")
    return module.startswith("kvtier") or "._" not in f"{module}.{name}"


def is_foreign(node, modules):
    name, on = node.attr, receiver(node)
    if name.startswith("__") or "kvtier" in name:
        return False
    if is_private(name):
        return name not in own_names() or (on != "self" and name in foreign_names())
    if modules.get(on) == "transformers":
        return name not in transformers.__all__
    if name in COMPAT_ONLY:
        return on not in OWN_OBJECTS
    imported = modules.get(root(node), "transformers") != "transformers"
    return not imported and name not in own_names() | library_names() | documented()


def test_only_compat_takes_what_transformers_does_not_promise():
    found = {name: trespasses(text) for name, text in sources().items()
             if name.startswith("kvtier/") and name != "kvtier/compat.py" and "fsspec" not in text}  # fmt: skip
    assert not {name: where for name, where in found.items() if where}, (
        "private or undocumented parts of transformers or torch: move them to kvtier/compat.py with a test above, or, "
        "if transformers documents them, add them to DOCUMENTED in this file"
    )
    assert len(found) > 10


def test_the_check_finds_what_compat_does():
    found = " ".join(trespasses(sources()["kvtier/compat.py"]))
    for name in ("_attn_implementation_internal", "sliding_window", "layer_types", "is_causal", "use_rope"):
        assert name in found


PLANTED = [
    "model._init_weights(layer)",
    "config._attn_implementation_internal = 'kvtier'",
    "x = torch._C",
    "import torch\nx = torch._C",
    "cache._lane._seen_tokens",
    "self.model._prepare_cache_for_generation()",
    "getattr(model, '_supports_sdpa', False)",
    "vars(config)['_attn_implementation_internal']",
    "hasattr(rotary, 'original_inv_freq')",
    "window = module.sliding_window",
    "kinds = self.model.config.layer_types",
    "theta = config.something_new",
    "getattr(config, 'something_new', None)",
    "import transformers.masking_utils",
    "import transformers as t\nt.masking_utils.create_causal_mask",
    "from transformers.masking_utils import create_causal_mask",
    "from transformers.cache_utils import DynamicSlidingWindowLayer",
    "from transformers.models.llama.modeling_llama import apply_rotary_pos_emb",
    "from torch._dynamo import disable",
    "import torch._dynamo",
    "def _init_weights(self): ...\nmodel._modules",
]
FINE = [
    "cache._lane.sequences[0].length",
    "self._runtime._gpu.used_bytes",
    "key._kvtier = (lane, 3)\nmark = getattr(key, '_kvtier', None)",
    "window = engine.shape.sliding_window",
    "from transformers import Cache, GenerationMixin\nfrom transformers.cache_utils import CacheLayerMixin",
    "from transformers.utils import logging\nlogging.disable_progress_bar()",
    "n = model.config.num_hidden_layers\nx = ids.cpu().numel()",
    "import argparse\nargparse.ArgumentParser().add_argument('--x')",
]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_violation_is_found(planted):
    assert len(trespasses(planted)) == 1


@pytest.mark.parametrize("fine", FINE)
def test_what_is_ours_or_public_is_fine(fine):
    assert trespasses(fine) == []


def test_names_of_our_subclasses_override_nothing_private():
    """An attribute of ours that a base class of transformers or torch also has would change what the base does."""
    import kvtier.cache  # noqa: F401 - the subclasses below must exist

    for kind in (Cache, CacheLayerMixin, transformers.StoppingCriteria, torch.nn.Module):
        for own in (c for c in kind.__subclasses__() if c.__module__.startswith("kvtier.")):
            tree = ast.parse(inspect.getsource(own))
            private = {name for name in defined_in(tree) if is_private(name)}
            assert not private & set(dir(kind)), moved(f"private names of {kind.__name__}", inspect.getsourcefile(own))


def test_documented_attributes_still_exist():
    for owner, names in DOCUMENTED.items():
        made = owner() if isinstance(owner, type) and issubclass(owner, transformers.PreTrainedConfig) else owner
        fields = getattr(owner, "__annotations__", {})
        gone = {n for n in names.split() if not hasattr(made, n) and n not in fields and n not in
                ("training", "config", "generation_config", "chat_template")}  # fmt: skip
        assert not gone, moved(f"{owner.__name__} lacks {gone}", "where kvtier/ reads them")
    model = tiny_llama()
    assert model.training is False
    assert isinstance(model.generation_config, GenerationConfig)


def test_compat_is_small():
    """Each exception is a risk with every version of transformers."""
    functions = [n.name for n in ast.parse(sources()["kvtier/compat.py"]).body if isinstance(n, ast.FunctionDef)]
    source = Path(__file__).read_text(encoding="utf-8")
    for name in functions:
        assert f"compat.{name}(" in source, f"no test in this file uses compat.{name}"
    for name in COMPAT_ONLY - {"layer_types"}:
        assert name in sources()["kvtier/compat.py"], f"{name} is not read there any more: remove it here"
