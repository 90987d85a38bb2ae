"""What tells models apart, written down with what they have read."""

import hashlib
import json
from typing import Any

import torch

from kvtier.runtime.library import Attributes

IMMATERIAL = {
    *("architectures", "attn_implementation", "chunk_size_feed_forward", "dtype", "experts_implementation", "id2label"),
    *("initializer_range", "is_encoder_decoder", "label2id", "name_or_path", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "pretraining_tp", "problem_type", "return_dict", "torch_dtype"),
    *("transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Fields of a model's config that change nothing in what it makes of given tokens; ``dtype`` is compared elsewhere."""
SAMPLES = 256
"""Values of each weight tensor that its fingerprint looks at."""


def model_facts(model: Any) -> Attributes:
    """What tells models apart, but for their weights: class and config; and the name, for people."""
    fields = model.config.to_dict()
    material = {k: v for k, v in fields.items() if k not in IMMATERIAL and k[0].isalpha()}
    name = next((v for k, v in fields.items() if k.endswith("name_or_path") and v), fields["model_type"])
    return {
        "class": type(model).__name__,
        "name": name,
        "config": json.loads(json.dumps(material, default=str, sort_keys=True)),
    }


def weights_digest(model: Any) -> str:
    """A hash of names, shapes, dtypes and ``SAMPLES`` evenly spaced values of every weight tensor.

    A sample: it tells other models and further training apart, not a single changed value.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        step = flat.numel() // SAMPLES | 1  # odd: an even step would meet one column of a matrix again and again
        picked = flat[::step].cpu().contiguous()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(picked.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
