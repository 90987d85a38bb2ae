"""What to change so that a context fits: every line is computed, none is a guess."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvtier.config import Config
from kvtier.footprint import Footprint
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.shards import BLOCK_BYTES
from kvtier.runtime.sizing import item_bytes
from kvtier.runtime.summary import Summary, make_summary

SMALLER = ((16, 4), (16, 2), (8, 4), (8, 2), (4, 4), (4, 2))
"""``[summary] rank`` and ``bits`` of sketches, the better ones first."""
WASTE = 0.1
"""Share of padding that is worth a word."""
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size(nbytes: int) -> str:
    """At least ``nbytes``, as ``[budget]`` reads it: three digits and more."""
    for unit, factor in _UNITS:
        if nbytes >= 10 * factor:
            return f"{-(-nbytes // factor)}{unit}"
    return f"{nbytes}B"


@dataclass(frozen=True)
class Advisor:
    """Looks for changes.

    Parameters
    ----------
    footprint, tokens : what is planned
    config : from which the footprint was made
    """

    footprint: Footprint
    tokens: int
    config: Config

    def lines(self) -> list[str]:
        """What to do, the first things first."""
        f = self.footprint
        if f.fits(self.tokens):
            return [*self._all_in_host(), *self._padding()]
        lines = [*self._length()]
        if not f.fits(self.tokens, "host", "disk"):
            lines += [*self._dtypes(), *self._lower_tiers(), *self._padding()]
        if not f.fits(self.tokens, "device"):
            lines += [*self._device()]
        return lines

    def _all_in_host(self) -> Iterator[str]:
        f, tiers = self.footprint, self.footprint.tiers(self.tokens)
        total, held = f.chunks(self.tokens), tiers["host"].chunks
        if held < total:
            needed = replace(f, budgets=replace(f.budgets, disk_bytes=None), _known={})
            least = needed.changed(durable=False).least_budget(self.tokens, "host")
            yield (
                f"{100 * (total - held) / total:.0f}% of the chunks are on the disk alone; with [budget] host = "
                f'"{size(least)}" the host holds all of them'
            )

    def _padding(self) -> Iterator[str]:
        """A chunk length whose records fill the blocks of the disk better."""
        f, g = self.footprint, self.footprint.geometry
        disk = f.disk(self.tokens)
        if disk is None or not disk.lines.get("padding"):
            return

        def wasted(chunk: int) -> float:
            payload = item_bytes(f.shape, replace(g, chunk=chunk), f.bits)
            return 1 - payload / (-(-payload // BLOCK_BYTES) * BLOCK_BYTES)

        now = wasted(g.chunk)
        lengths = [n for n in range(8, 2 * g.chunk + 1, 8) if 2 * n >= g.chunk and replace(g, chunk=n).bound <= g.max]
        best = min(lengths, key=lambda n: (wasted(n), abs(n - g.chunk)), default=g.chunk)
        if now > WASTE and wasted(best) < now / 2:
            yield (
                f"{100 * now:.0f}% of each record on the disk is padding to a multiple of {BLOCK_BYTES} bytes; with "
                f"[attention] chunk = {best} it would be {100 * wasted(best):.0f}%"
            )

    def _length(self) -> Iterator[str]:
        most = self.footprint.most_tokens(self.tokens)
        if most:
            yield f"as configured, {most:,} tokens fit ({100 * most / self.tokens:.0f}%)"
        else:
            yield "as configured, no context fits, however short"

    def _dtypes(self) -> Iterator[str]:
        for dtype, bits in (("int8", 8), ("int4", 4)):
            if self.footprint.bits is not None and self.footprint.bits <= bits:
                continue
            changed = self.footprint.changed(bits=bits)
            if changed.fits(self.tokens, "host", "disk"):
                rest = "" if changed.fits(self.tokens) else " host and disk; the device still lacks room"
                yield f'[store] dtype = "{dtype}": then it fits{rest}'
                return
            most = changed.most_tokens(self.tokens)
            if most > self.footprint.most_tokens(self.tokens):
                yield f'[store] dtype = "{dtype}": then {most:,} tokens fit'

    def _lower_tiers(self) -> Iterator[str]:
        f = self.footprint
        tiers = f.tiers(self.tokens)
        host_alone = not f.fits(self.tokens, "host")
        if host_alone or (not f.durable and "disk" in tiers):
            yield f'[budget] host = "{size(f.least_budget(self.tokens, "host"))}" or more' + (
                "" if host_alone else " with the disk as it is"
            )
        if "disk" in tiers:
            if not f.fits(self.tokens, "disk"):
                least = size(f.least_budget(self.tokens, "disk"))
                yield f'[budget] disk = "{least}" or more' + ("" if host_alone else " with the host as it is")
        elif f.budgets.host_bytes >= tiers["host"].least:
            added = f.changed(disk_bytes=1)
            yield f'a store: [store] path and [budget] disk = "{size(added.least_budget(self.tokens, "disk"))}" or more'

    def _device(self) -> Iterator[str]:
        f = self.footprint
        least = f.least_budget(self.tokens, "gpu")
        yield f'[budget] gpu = "{size(least)}" or more (now {format_bytes(f.budgets.gpu_bytes)})'
        if f.budgets.gpu_bytes < f.tiers(self.tokens)["device"].least:
            yield "a lower [attention] local, select or max, or [prefill] block: the budget is below any context's"
            return
        yield from self._two_levels()
        now = f.summary.chunk_bytes()
        for rank, bits in SMALLER:
            if rank > f.shape.head_dim:
                continue
            summary = self._sketch(rank, bits, f.summary.levels)
            changed = f.changed(summary=summary)
            if summary.chunk_bytes() < now and changed.fits(self.tokens, "device"):
                kind = "" if self.config.summary.kind == "sketch" else 'kind = "sketch", '
                yield (
                    f"[summary] {kind}rank = {rank}, bits = {bits}: then the device suffices "
                    f"({100 * summary.chunk_bytes() / now:.0f}% of the summaries' bytes; it finds fewer of them)"
                )
                return
        if f.rows > 1:
            yield "fewer rows at a time"

    def _two_levels(self) -> Iterator[str]:
        """The sketches on the host, where that makes the device suffice."""
        f = self.footprint
        if f.summary.levels == 2 or self.config.summary.kind != "sketch":
            return
        changed = f.changed(summary=self._sketch(f.summary.rank, f.summary.bits, levels=2))
        if changed.fits(self.tokens, "device"):
            fine = changed.host(self.tokens).lines["fine_codes"]
            more = "" if changed.fits(self.tokens, "host", "disk") else ", where that does not fit as it is"
            yield (
                f"[summary] levels = 2: then the device suffices; {format_bytes(fine)} of sketches go to the host"
                f"{more} (it chooses most of the same chunks: docs/summaries.md)"
            )

    def _sketch(self, rank: int, bits: int, levels: int) -> Summary:
        f = self.footprint
        sizes = {"chunk": f.geometry.chunk, "head_dim": f.shape.head_dim, "rank": rank, "bits": bits}
        return make_summary("sketch", dtype=f.shape.dtype, levels=levels, overfetch=f.summary.overfetch, **sizes)
