"""What an offload block has done so far, as a dict that prints itself."""

import time
from dataclasses import dataclass
from typing import Any

from kvtier.runtime.budget import format_bytes


@dataclass
class Clock:
    """Running totals of the forwards of one offload block."""

    prefill_tokens: int = 0
    resumed_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def add(self, n_tokens: int, n_rows: int, was_empty: bool, started: float) -> None:
        """Count a call of ``n_tokens`` in ``n_rows`` that began at ``started`` (perf_counter).

        One token a row on a cache is a step.
        """
        seconds = time.perf_counter() - started
        if n_tokens == n_rows and not was_empty:
            self.decode_steps += 1
            self.decode_tokens += n_tokens
            self.decode_seconds += seconds
        else:
            self.prefill_tokens += n_tokens
            self.prefill_seconds += seconds

    def report(self) -> dict[str, dict[str, Any]]:
        """The "prefill" and "decode" parts of ``kv.stats()``."""
        return {
            "prefill": {
                "computed_tokens": self.prefill_tokens,
                "resumed_tokens": self.resumed_tokens,
                "seconds": self.prefill_seconds,
                "tokens_per_s": self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else None,
            },
            "decode": {
                "steps": self.decode_steps,
                "ms_per_step": 1e3 * self.decode_seconds / self.decode_steps if self.decode_steps else None,
                "tokens_per_s": self.decode_tokens / self.decode_seconds if self.decode_seconds else None,
            },
        }


class Stats(dict[str, Any]):
    """``kv.stats()``: {"tiers": {"device" | "host" | "disk": {...}}, "prefill": {...}, "decode": {...}, ...}.

    Per tier: ``bytes`` in use and ``budget`` in bytes, ``chunks`` held, ``hits``, ``misses``, ``hit_rate`` (None before
    any chunk was asked for), ``bytes_read`` and ``bytes_written`` (payload).
    """

    def __str__(self) -> str:
        lines = [f"{'tier':<7}{'in use':>12}{'budget':>12}{'chunks':>9}{'hit rate':>10}{'read':>12}{'written':>12}"]
        for name, tier in self["tiers"].items():
            rate = "-" if tier["hit_rate"] is None else f"{100 * tier['hit_rate']:.1f}%"
            lines.append(
                f"{name:<7}{format_bytes(tier['bytes']):>12}{format_bytes(tier['budget']):>12}{tier['chunks']:>9}{rate:>10}"
                f"{format_bytes(tier['bytes_read']):>12}{format_bytes(tier['bytes_written']):>12}"
            )
        prefill, decode, stalls = self["prefill"], self["decode"], self["stalls"]
        if prefill["tokens_per_s"] is not None:
            lines.append(f"prefill {prefill['computed_tokens']} tokens, {prefill['tokens_per_s']:.1f} tokens/s")
        if decode["tokens_per_s"] is not None:
            lines.append(
                f"decode  {decode['steps']} steps, {decode['ms_per_step']:.1f} ms each, "
                f"{decode['tokens_per_s']:.2f} tokens/s"
            )
        lines.append(
            f"waited  {stalls['fetch_seconds']:.2f} s for chunks, {stalls['spill_seconds']:.2f} s for spilling"
        )
        return "\n".join(lines)
