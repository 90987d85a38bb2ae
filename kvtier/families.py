"""Which models kvtier can serve, decided by the exact class of their attention modules."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from kvtier.compat import frequencies, is_causal, is_rotary, layer_type, sliding_window, uses_rope
from kvtier.rope import deinterleaved, trained_window
from kvtier.runtime.errors import UnsupportedError
from kvtier.runtime.model import ModelShape


@dataclass(frozen=True, slots=True)
class Family:
    """How a model family differs from Llama: the field that a new family needs goes here.

    All of them apply one rotary module (to the first dimensions of a head or all) to queries and keys just before the
    cache's ``update``, and pass the factor of q.k to attention.
    """

    name: str
    has_positions: Callable[[torch.nn.Module], bool] = lambda attention: True
    """Whether a layer, by its attention module, rotates its queries and keys."""
    stock_inputs: bool = False
    """Its own ``prepare_inputs_for_generation`` drops the cache at the trained window: use the stock one."""
    window_in_config: bool = False
    """Its attention modules have no sliding window of their own and pass the config's."""
    interleaved: bool = False
    """Its rotary embedding turns the pairs of dimensions (0, 1), (2, 3), ... instead of (0, R/2), (1, R/2 + 1), ..."""
    half_width: bool = False
    """Its rotary module returns one cos and sin per pair of dimensions, not per dimension."""


def _attention(model: str, prefix: str) -> str:
    return f"transformers.models.{model}.modeling_{model}.{prefix}Attention"


FAMILIES = {
    _attention("llama", "Llama"): Family("Llama"),
    _attention("mistral", "Mistral"): Family("Mistral", window_in_config=True),
    _attention("mixtral", "Mixtral"): Family("Mixtral", window_in_config=True),
    _attention("qwen2", "Qwen2"): Family("Qwen2"),
    _attention("qwen3", "Qwen3"): Family("Qwen3"),
    _attention("qwen3_moe", "Qwen3Moe"): Family("Qwen3-MoE"),
    _attention("phi3", "Phi3"): Family("Phi-3", stock_inputs=True, window_in_config=True),
    _attention("olmo2", "Olmo2"): Family("OLMo2"),
    _attention("granite", "Granite"): Family("Granite"),
    _attention("smollm3", "SmolLM3"): Family("SmolLM3", has_positions=uses_rope),
    _attention("gemma", "Gemma"): Family("Gemma 1"),
    _attention("starcoder2", "Starcoder2"): Family("Starcoder2", window_in_config=True),
    _attention("stablelm", "StableLm"): Family("StableLM"),
    _attention("phi", "Phi"): Family("Phi"),
    _attention("gemma2", "Gemma2"): Family("Gemma 2"),
    _attention("gemma3", "Gemma3"): Family("Gemma 3"),
    _attention("olmo3", "Olmo3"): Family("OLMo 3"),
    _attention("gpt_oss", "GptOss"): Family("gpt-oss", half_width=True),
    _attention("glm", "Glm"): Family("GLM", interleaved=True),
    _attention("glm4", "Glm4"): Family("GLM-4", interleaved=True),
    _attention("cohere", "Cohere"): Family("Cohere", interleaved=True),
    _attention("cohere2", "Cohere2"): Family(
        "Cohere 2", interleaved=True, has_positions=lambda attention: sliding_window(attention) is not None
    ),
    _attention("ernie4_5", "Ernie4_5"): Family("Ernie 4.5", interleaved=True),
    _attention("ernie4_5_moe", "Ernie4_5_Moe"): Family("Ernie 4.5 MoE", interleaved=True),
    _attention("helium", "Helium"): Family("Helium", interleaved=True),
}
"""Attention classes that were tested, by their full name."""

_LATENT = "multi-head latent attention keeps no keys per head"
_QUERY_SCALE = "it scales queries by their position"
_LINEAR = "its other layers are linear attention"
_NO_ROTARY = "its positions are not rotary"
REFUSED = {
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
class LayerPositions:
    """How a layer rotates its queries and keys."""

    rotates: bool
    layer_type: str | None
    """Which of the rotary module's sets of frequencies it uses, where there are several."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The parts of a model that kvtier works on."""

    family: Family
    shape: ModelShape
    rotary: torch.nn.Module
    """The one module that makes cos and sin for all layers."""
    layers: tuple[LayerPositions, ...]

    @property
    def cos_width(self) -> int:
        """Last dimension of the cos that the rotary module returns."""
        return self._n_pairs * (1 if self.family.half_width else 2)

    def order(self) -> torch.Tensor | None:
        """The order [D] of dimensions in which the rotary embedding is "rotate half"; None: as they are."""
        if not self.family.interleaved:
            return None
        return deinterleaved(2 * self._n_pairs, self.shape.head_dim, self.shape.device)

    @property
    def _n_pairs(self) -> int:
        return frequencies(self.rotary, self.layers[0].layer_type)[0].numel()


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
    windows = _sliding_windows(model, family, attention)
    rotary = {name: m for name, m in model.named_modules() if is_rotary(m)}
    if len(rotary) != 1:
        raise UnsupportedError(
            f"{type(model).__name__} has {len(rotary)} rotary modules ({', '.join(rotary)}), kvtier handles exactly one"
        )
    layers = tuple(
        LayerPositions(family.has_positions(m), layer_type(model.config, i)) for i, m in enumerate(attention.values())
    )
    return Anatomy(family, _shape(model.config, model, windows), next(iter(rotary.values())), layers)


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


def _sliding_windows(model: PreTrainedModel, family: Family, attention: dict[str, torch.nn.Module]) -> list[int | None]:
    """Per layer, its sliding window, or None if it attends to all tokens before its own.

    A window as long as the trained one leaves none out.
    """
    trained = trained_window(model.config)
    windows: list[int | None] = []
    for name, module in attention.items():
        if not is_causal(module):
            raise UnsupportedError(f"{name} ({type(module).__name__}) is bidirectional: kvtier attends causally")
        window = sliding_window(model.config if family.window_in_config else module)
        windows.append(None if window is None or window >= trained else window)
    lengths = {window for window in windows if window is not None}
    if len(lengths) > 1:
        raise UnsupportedError(
            f"{type(model).__name__} has layers with sliding windows of different lengths ({sorted(lengths)}): kvtier "
            "handles one"
        )
    return windows


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


def _shape(config: PreTrainedConfig, model: PreTrainedModel, windows: list[int | None]) -> ModelShape:
    heads = config.num_attention_heads
    return ModelShape(
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype,
        device=model.device,
        sliding_layers=frozenset(i for i, window in enumerate(windows) if window is not None),
        sliding_window=next((window for window in windows if window is not None), None),
    )
