"""Which models kvtier can serve, decided by the exact class of their attention modules."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from kvtier.rope import trained_window
from kvtier.runtime.engine import ModelShape
from kvtier.runtime.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Family:
    """How a model family differs from Llama: the field that a new family needs goes here.

    All of them apply one rotary module ("rotate half", the first dimensions of a head or all) to queries and keys just
    before the cache's ``update``, and pass the factor of q.k to attention.
    """

    name: str
    has_positions: Callable[[torch.nn.Module], bool] = lambda attention: True
    """Whether a layer, by its attention module, rotates its queries and keys."""
    stock_inputs: bool = False
    """Its own ``prepare_inputs_for_generation`` drops the cache at the trained window: use the stock one."""


def _attention(model: str, prefix: str) -> str:
    return f"transformers.models.{model}.modeling_{model}.{prefix}Attention"


FAMILIES = {
    _attention("llama", "Llama"): Family("Llama"),
    _attention("mistral", "Mistral"): Family("Mistral"),
    _attention("mixtral", "Mixtral"): Family("Mixtral"),
    _attention("qwen2", "Qwen2"): Family("Qwen2"),
    _attention("qwen3", "Qwen3"): Family("Qwen3"),
    _attention("qwen3_moe", "Qwen3Moe"): Family("Qwen3-MoE"),
    _attention("phi3", "Phi3"): Family("Phi-3", stock_inputs=True),
    _attention("olmo2", "Olmo2"): Family("OLMo2"),
    _attention("granite", "Granite"): Family("Granite"),
    _attention("smollm3", "SmolLM3"): Family("SmolLM3", has_positions=lambda attention: bool(attention.use_rope)),
    _attention("gemma", "Gemma"): Family("Gemma 1"),
    _attention("starcoder2", "Starcoder2"): Family("Starcoder2"),
    _attention("stablelm", "StableLm"): Family("StableLM"),
    _attention("phi", "Phi"): Family("Phi"),
}
"""Attention classes that were tested, by their full name."""

_INTERLEAVED = "its rotary embedding turns interleaved pairs of dimensions"
_SLIDING = "layers with a sliding window are not supported yet"
_LATENT = "multi-head latent attention keeps no keys per head"
_QUERY_SCALE = "it scales queries by their position"
_LINEAR = "its other layers are linear attention"
_NO_ROTARY = "its positions are not rotary"
REFUSED = {
    _attention("glm", "Glm"): _INTERLEAVED,
    _attention("glm4", "Glm4"): _INTERLEAVED,
    _attention("cohere", "Cohere"): _INTERLEAVED,
    _attention("cohere2", "Cohere2"): f"{_INTERLEAVED}, and {_SLIDING}",
    _attention("ernie4_5", "Ernie4_5"): _INTERLEAVED,
    _attention("ernie4_5_moe", "Ernie4_5_Moe"): _INTERLEAVED,
    _attention("helium", "Helium"): _INTERLEAVED,
    _attention("gptj", "GPTJ"): _INTERLEAVED,
    _attention("gemma2", "Gemma2"): f"it caps attention scores (softcap), and {_SLIDING}",
    _attention("gemma3", "Gemma3"): f"it has two sets of rotary frequencies, and {_SLIDING}",
    _attention("olmo3", "Olmo3"): f"it has two sets of rotary frequencies, and {_SLIDING}",
    _attention("gpt_oss", "GptOss"): f"it has learned attention sinks (s_aux), and {_SLIDING}",
    _attention("deepseek_v2", "DeepseekV2"): _LATENT,
    _attention("deepseek_v3", "DeepseekV3"): _LATENT,
    _attention("ministral3", "Ministral3"): _QUERY_SCALE,
    _attention("llama4", "Llama4Text"): _QUERY_SCALE,
    _attention("qwen3_next", "Qwen3Next"): _LINEAR,
    _attention("minimax", "MiniMax"): _LINEAR,
    _attention("minimax", "MiniMaxLightning"): "it is linear attention",
    _attention("gpt2", "GPT2"): _NO_ROTARY,
    _attention("opt", "OPT"): _NO_ROTARY,
    _attention("bloom", "Bloom"): _NO_ROTARY,
}
"""Why attention classes that users are likely to try cannot be served; any other class is refused as untested."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a model that kvtier works on."""

    family: Family
    shape: ModelShape
    rotary: torch.nn.Module
    """The one module that makes cos and sin for all layers."""


def _class_name(module: torch.nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def examine(model: object) -> Anatomy:
    """Check that a model can be served and find its parts. Raises UnsupportedError naming the reason."""
    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin):
        raise UnsupportedError(
            "kvtier.offload needs a transformers causal language model (AutoModelForCausalLM), "
            f"not {type(model).__name__}"
        )
    attention = _attention_modules(model)
    family = FAMILIES[_class_name(next(iter(attention.values())))]
    _check_state(model)
    _check_layers(model, attention)
    rotary = {name: m for name, m in model.named_modules() if hasattr(m, "original_inv_freq")}
    if len(rotary) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} has {len(rotary)} rotary modules ({', '.join(rotary)}), kvtier handles exactly one"
        )
    unrotated = frozenset(i for i, m in enumerate(attention.values()) if not family.has_positions(m))
    return Anatomy(family, _shape(model.config, model, unrotated), next(iter(rotary.values())))


def _attention_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The attention modules by name, in the order of the layers, all of one supported class."""
    kind = type(model).__name__
    known = f"Supported families: {', '.join(f.name for f in FAMILIES.values())}"
    attention = {name: m for name, m in model.named_modules() if type(m).__name__.endswith("Attention")}
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind} is not supported: it is an encoder-decoder model. {known}")
    if not attention:
        raise UnsupportedError(f"{kind} is not supported: it uses no attention modules. {known}")
    for name, module in attention.items():
        if (full := _class_name(module)) not in FAMILIES:
            reason = REFUSED.get(full, "not tested with kvtier")
            raise UnsupportedError(f"{kind} is not supported: it uses {full} ({reason}) as {name}. {known}")
    if model.config.get_text_config(decoder=True) is not model.config:
        raise UnsupportedError(f"{kind} is not supported: its language model is a part of it. {known}")
    if len({type(m) for m in attention.values()}) > 1:
        raise UnsupportedError(f"{kind} is not supported: it mixes attention classes of several families. {known}")
    if len(attention) != model.config.num_hidden_layers:
        raise UnsupportedError(
            f"{kind} has {len(attention)} attention modules for {model.config.num_hidden_layers} layers"
        )
    return attention


def _check_layers(model: PreTrainedModel, attention: dict[str, torch.nn.Module]) -> None:
    """Every layer must attend to all tokens before its own. A window as long as the trained one leaves none out."""
    trained = trained_window(model.config)
    for name, module in attention.items():
        window = getattr(module, "sliding_window", getattr(model.config, "sliding_window", None))
        if window is not None and int(window) < trained:
            raise UnsupportedError(
                f"{name} ({type(module).__name__}) has a sliding window ({window} tokens): layers with a sliding "
                f"window are not supported yet (the model was trained on {trained} tokens)"
            )
        if not getattr(module, "is_causal", True):
            raise UnsupportedError(f"{name} ({type(module).__name__}) is bidirectional: kvtier attends causally")


def _check_state(model: PreTrainedModel) -> None:
    check_mode(model)
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedError(f"the model's weights are on {len(devices)} devices ({devices}): put them on one")
    if getattr(model, "use_kernels", False):
        raise UnsupportedError("the model was loaded with use_kernels=True: hub kernels replace what kvtier wraps")


def check_mode(model: PreTrainedModel) -> None:
    """Refuse what can be switched on a model at any time; checked again at every call."""
    if model.training:
        raise UnsupportedError("the model is in training mode: call model.eval() first, kvtier only reads")
    if getattr(model.config, "output_attentions", False):
        raise UnsupportedError("config.output_attentions = True: kvtier never has the whole attention matrix")
    if getattr(model.config, "output_hidden_states", False):
        raise UnsupportedError("config.output_hidden_states = True: only the last block's would be returned")
    if getattr(model.config, "output_router_logits", False):
        raise UnsupportedError("config.output_router_logits = True: only the last block's would be returned")


def _shape(config: PreTrainedConfig, model: PreTrainedModel, unrotated: frozenset[int]) -> ModelShape:
    heads = config.num_attention_heads
    return ModelShape(
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype,
        device=model.device,
        unrotated=unrotated,
    )
