"""kvtier: long contexts for stock Hugging Face models, with the KV cache tiered over GPU, host memory and disk."""

from kvtier.cache import TieredCache
from kvtier.config import Config
from kvtier.offload import Offload, offload
from kvtier.runtime.errors import BudgetError, ConfigError, KvtierError, StoreError, UnsupportedError

__all__ = [
    "BudgetError",
    "Config",
    "ConfigError",
    "KvtierError",
    "Offload",
    "StoreError",
    "TieredCache",
    "UnsupportedError",
    "offload",
]
__version__ = "0.1.0"
