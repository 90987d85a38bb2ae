"""Which models kvtier can serve, decided by the exact class of their attention modules."""

from dataclasses import dataclass

import torch
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from kvtier.runtime.engine import ModelShape
from kvtier.runtime.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class Family:
    """How a model family differs from Llama. Nothing does yet: the field that a new family needs goes here."""

    name: str


FAMILIES = {
    "transformers.models.llama.modeling_llama.LlamaAttention": Family("Llama"),
}
"""Attention classes that were tested, by their full name."""


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
    family = _family(model)
    _check_state(model)
    rotary = [m for m in model.modules() if hasattr(m, "original_inv_freq")]
    if len(rotary) != 1:
        raise UnsupportedError(f"{type(model).__name__} has {len(rotary)} rotary modules, kvtier handles exactly one")
    return Anatomy(family, _shape(model.config, model), rotary[0])


def _family(model: PreTrainedModel) -> Family:
    attention = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    names = sorted({_class_name(m) for m in attention})
    unknown = [name for name in names if name not in FAMILIES]
    known = ", ".join(f.name for f in FAMILIES.values())
    if unknown or not names:
        found = unknown[0] if unknown else "no attention modules"
        raise UnsupportedError(f"{type(model).__name__} is not supported: it uses {found}. Supported families: {known}")
    if len(attention) != model.config.num_hidden_layers:
        raise UnsupportedError(
            f"{type(model).__name__} has {len(attention)} attention modules for {model.config.num_hidden_layers} layers"
        )
    return FAMILIES[names[0]]


def _check_state(model: PreTrainedModel) -> None:
    check_mode(model)
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        raise UnsupportedError(f"the model's weights are on {len(devices)} devices ({devices}): put them on one")
    if getattr(model, "use_kernels", False):
        raise UnsupportedError("the model was loaded with use_kernels=True: hub kernels replace what kvtier wraps")
    if getattr(model.config, "sliding_window", None) is not None:
        raise UnsupportedError(
            f"layers with a sliding window ({model.config.sliding_window} tokens) are not supported yet"
        )


def check_mode(model: PreTrainedModel) -> None:
    """Refuse what can be switched on a model at any time; checked again at every call."""
    if model.training:
        raise UnsupportedError("the model is in training mode: call model.eval() first, kvtier only reads")
    if getattr(model.config, "output_attentions", False):
        raise UnsupportedError("config.output_attentions = True: kvtier never has the whole attention matrix")
    if getattr(model.config, "output_hidden_states", False):
        raise UnsupportedError("config.output_hidden_states = True: only the last block's would be returned")


def _shape(config: PreTrainedConfig, model: PreTrainedModel) -> ModelShape:
    heads = config.num_attention_heads
    return ModelShape(
        n_layers=config.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype,
        device=model.device,
    )
