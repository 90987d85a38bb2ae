"""A model without its weights: its config, its parts on the meta device, and how many bytes its weights take."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvtier.families import Anatomy, examine
from kvtier.runtime.errors import ConfigError, KvtierError

DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
    **dict.fromkeys(("float16", "fp16", "half"), torch.float16),
    **dict.fromkeys(("float32", "fp32", "float"), torch.float32),
}
BITS = {"int8": 8, "int4": 4}
"""Weights in so few bits: those of linear layers and experts, but for the output layer; the others stay as they are."""
GROUP = 64
"""Numbers of int4 weights that share a scale of 4 bytes (bitsandbytes); int8: a row does."""
_EXPERTS = (
    ("num_experts_per_tok", "num_local_experts"),
    ("num_experts_per_tok", "num_experts"),
    ("moe_k", "moe_num_experts"),
)


@dataclass(frozen=True, slots=True)
class Outline:
    """What can be known of a model from its config."""

    name: str
    kind: str
    """Its class."""
    config: PreTrainedConfig
    anatomy: Anatomy
    """On the meta device."""
    weights: str
    """"bfloat16", "int4", ..."""
    parameters: int
    weight_bytes: int
    step_bytes: int
    """Of the weights that one token goes through: of the experts those chosen, of the input embedding nothing."""
    layer_parameters: int
    """That a token of a prompt is multiplied with: not those of embeddings and output layer."""
    notes: tuple[str, ...]


def outline(model: str | os.PathLike[str], weights: str = "auto") -> Outline:
    """Read the config of a hub name, a folder, a .gguf file or a config.json, and nothing else.

    Parameters
    ----------
    weights : "auto" (as stored), "bfloat16", "float16", "float32" (or "bf16", ...), "int8" or "int4"

    Raises
    ------
    KvtierError
        There is no such model, or transformers cannot read its config.
    ConfigError
        Unknown ``weights``.
    UnsupportedError
        A model that ``kvtier.offload`` refuses, for the same reason.
    """
    if weights not in ("auto", *DTYPES, *BITS):
        raise ConfigError(f"weights {weights!r} are not known: auto, bfloat16, float16, float32, int8 or int4")
    path = Path(model).expanduser()
    is_path = path.is_absolute() or path.suffix in (".gguf", ".json") or str(model).startswith(".")
    if is_path and not path.exists():
        raise KvtierError(f"cannot read the config of {str(model)!r}: there is no such file or folder")
    is_gguf = path.suffix == ".gguf"
    try:
        where, gguf = (path.parent, {"gguf_file": path.name}) if is_gguf else (path if path.exists() else model, {})
        config: Any = AutoConfig.from_pretrained(where, trust_remote_code=False, **gguf)
        facts: dict[str, Any] = config.to_dict()
        dtype, notes = _dtype_of(facts.get("dtype"), weights, is_gguf)
        with torch.device("meta"):
            empty = cast(Any, AutoModelForCausalLM).from_config(config, dtype=dtype, attn_implementation="eager").eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise KvtierError(f"transformers cannot read the config of {str(model)!r}: {_one_line(error)}") from error
    anatomy = examine(empty)
    bits = BITS.get(weights) or (stored_bits(facts) if weights == "auto" else None)
    roles = _roles(empty)
    sizes = {n: _Weight(roles.get(n, "expert" if _is_expert(n) else ""), p, bits) for n, p in empty.named_parameters()}
    share = expert_share(config)
    active = {name: share if _is_expert(name) else 1.0 for name in sizes}
    in_layers = [name for name in sizes if roles.get(name) not in ("embedding", "output")]
    # a tied output layer is the embedding
    last = [name for name in sizes if roles.get(name) == "output"] or [n for n in sizes if roles.get(n) == "embedding"]
    return Outline(
        name=path.parent.name if path.name == "config.json" else path.name if path.exists() else str(model),
        kind=type(empty).__name__,
        config=config,
        anatomy=anatomy,
        weights=str(dtype).removeprefix("torch.") if bits is None else f"int{bits}",
        parameters=sum(s.numbers for s in sizes.values()),
        weight_bytes=sum(s.nbytes for s in sizes.values()),
        step_bytes=round(sum(sizes[name].nbytes * active[name] for name in in_layers + last)),
        layer_parameters=round(sum(sizes[name].numbers * active[name] for name in in_layers)),
        notes=notes,
    )


class _Weight:
    """Numbers and bytes of one weight."""

    def __init__(self, role: str, tensor: torch.Tensor, bits: int | None) -> None:
        self.numbers = n = tensor.numel()
        self.nbytes = n * tensor.dtype.itemsize
        if bits is not None and (role == "linear" or (role == "expert" and tensor.ndim >= 3)):
            scales = n // tensor.shape[-1] if bits == 8 else -(-n // GROUP)
            self.nbytes = n * bits // 8 + 4 * scales


def _roles(model: PreTrainedModel) -> dict[str, str]:
    """By the name of a weight: "embedding", "linear", or "output" for the linear layer that stands outside of all."""
    roles = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            roles[f"{name}.weight"] = "embedding"
        elif isinstance(module, torch.nn.Linear):
            roles[f"{name}.weight"] = "linear" if "." in name else "output"
    return roles


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _dtype_of(stated: str | None, weights: str, is_gguf: bool) -> tuple[torch.dtype, tuple[str, ...]]:
    """In what the model computes, and so keeps K and V."""
    if weights in DTYPES:
        return DTYPES[weights], ()
    if stated in DTYPES:
        return DTYPES[stated], ()
    if weights in BITS:
        return torch.bfloat16, ()
    if is_gguf:
        return torch.float32, ('transformers turns a .gguf file into float32 with dtype "auto"; bfloat16 takes half',)
    return torch.float32, ("the config does not say in which dtype the weights are: float32 is assumed",)


def stored_bits(config: dict[str, Any]) -> int | None:
    """Bits a number of weights that are stored quantised; None: they are not, or it is not known."""
    facts: dict[str, Any] | None = config.get("quantization_config")
    if facts is None:
        return None
    method = str(facts.get("quant_method", ""))
    if facts.get("load_in_4bit") or "mxfp4" in method or facts.get("bits") == 4 or method == "awq":
        return 4
    return 8 if facts.get("load_in_8bit") or "fp8" in method or facts.get("bits") == 8 else None


def expert_share(config: PreTrainedConfig) -> float:
    """The share of the experts that a token goes through."""
    for chosen, there in _EXPERTS:
        if getattr(config, chosen, None) and getattr(config, there, None):
            return min(1.0, float(getattr(config, chosen)) / float(getattr(config, there)))
    return 1.0


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
