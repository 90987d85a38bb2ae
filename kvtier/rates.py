"""How fast a context can be read and continued at best: what must be moved and computed, over what the machine can.

What uses one resource (memory, link, disk, arithmetic) adds up, and the slowest resource counts: a run that overlapped
all of them perfectly would be as fast. Launches, latencies and Python are left out, so a run is slower.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kvtier.bandwidth import Bandwidths
from kvtier.footprint import Footprint
from kvtier.kernels.coarse import kept_tokens
from kvtier.outline import Outline
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.geometry import Geometry
from kvtier.runtime.slabs import SLAB_CHUNKS
from kvtier.runtime.summary import layout_bytes

SAMPLES = 64
"""Places of a context at which a block is looked at."""
RESOURCES = {
    "device_memory": "device memory",
    "matmul": "arithmetic",
    "link_up": "link to the device",
    "link_down": "link from the device",
    "disk": "disk",
}


@dataclass(frozen=True, slots=True)
class Term:
    """Something that must be moved or computed."""

    what: str
    resource: str
    amount: float
    """Bytes, or floating-point operations."""
    rate: float
    """Of them per second."""

    @property
    def seconds(self) -> float:
        return self.amount / self.rate

    def arithmetic(self) -> str:
        """For people: "1.50 GiB / 3092 GB/s"."""
        if self.resource == "matmul":
            return f"{self.amount / 1e9:.4g} GFLOP / {self.rate / 1e12:.4g} TFLOP/s"
        return f"{format_bytes(round(self.amount))} / {self.rate / 1e9:.4g} GB/s"

    def report(self) -> dict[str, Any]:
        return asdict(self) | {"seconds": self.seconds}


@dataclass(frozen=True, slots=True)
class Moment:
    """What the layers of one sequence do in a step, on average over the places looked at."""

    summary_bytes: float
    """Summaries that are read."""
    attended_bytes: float
    chosen: float
    """Chunks of one KV head each."""
    chosen_on_disk: float
    """As many of them as lie on the disk alone, if all chunks are chosen alike."""
    attended: float
    """Tokens, summed over the layers."""
    scored: float
    """Numbers of summaries per KV head that a query is multiplied with, summed over the layers."""
    fine_bytes: float
    """Fine codes that come from the host, with two levels."""


def moment(footprint: Footprint, tokens: int, new: int) -> Moment:
    """Of a step that adds the last ``new`` of ``tokens`` tokens."""
    f, g, shape = footprint, footprint.geometry, footprint.shape
    start = tokens - new
    retired = f.retired(start + 1)
    length = min(g.sink, start) + min(retired, g.select) * g.chunk + start - min(start, g.window_start(start)) + new
    slides = 0 if shape.sliding_window is None else min(start, shape.sliding_window - 1) + new
    attended = f.n_full * length + len(shape.sliding_layers) * slides
    chosen = f.n_full * min(retired, g.select) * shape.n_kv_heads
    scores = retired > g.select > 0
    total = f.chunks(start + 1)
    only_disk = max(0, total - f.host(start + 1).chunks) / total if total else 0.0
    coarse, fine = _looked_at(f, retired) if scores else (0, 0)
    return Moment(
        summary_bytes=f.n_full * coarse * shape.n_kv_heads * f.summary.chunk_bytes(),
        attended_bytes=2.0 * attended * shape.n_kv_heads * shape.head_dim * shape.dtype.itemsize,
        chosen=chosen,
        chosen_on_disk=chosen * only_disk,
        attended=attended,
        scored=f.n_full * (coarse * _numbers(f) if f.summary.levels == 1 else _sketch_numbers(f, coarse, fine)),
        fine_bytes=float(f.n_full * fine * shape.n_kv_heads * layout_bytes(f.summary.layout())),
    )


def _looked_at(footprint: Footprint, retired: int) -> tuple[int, int]:
    """Chunks per KV head whose summaries on the device, and whose fine codes from the host, are scored in a layer."""
    summary, select = footprint.summary, footprint.geometry.select
    if summary.levels == 1:
        return retired, 0
    if summary.proposes(retired, select, SLAB_CHUNKS):
        return retired, summary.overfetch * select
    return 0, retired


def _sketch_numbers(footprint: Footprint, coarse: int, fine: int) -> int:
    """Numbers of two levels that a query is multiplied with."""
    chunk = footprint.geometry.chunk
    return (coarse * kept_tokens(chunk) + fine * chunk) * footprint.summary.rank


def _numbers(footprint: Footprint) -> int:
    """Numbers of the summary of one chunk that a query is multiplied with."""
    g, dim, kind = footprint.geometry, footprint.shape.head_dim, footprint.summary.kernel_kind
    return {"sketch": g.chunk * footprint.summary.rank, "exact": g.chunk * dim, "mean": dim}.get(kind, 2 * dim)


def decode_terms(footprint: Footprint, outline: Outline, tokens: int, bw: Bandwidths, miss: float) -> Iterator[Term]:
    """One step of all rows, after ``tokens`` tokens."""
    rows, m = footprint.rows, moment(footprint, tokens + 1, 1)
    yield Term("weights", "device_memory", min(rows * outline.step_bytes, outline.weight_bytes), bw.device_memory)
    yield Term("summaries", "device_memory", rows * m.summary_bytes, bw.device_memory)
    yield Term("attended K and V", "device_memory", rows * m.attended_bytes, bw.device_memory)
    yield Term("fine codes of candidates", _link(footprint, "link_up"), rows * m.fine_bytes, bw.link_up)
    link = rows * miss * m.chosen * footprint.item_bytes
    yield Term("missed chunks", _link(footprint, "link_up"), link, bw.link_up)
    from_disk = rows * miss * m.chosen_on_disk * _record(footprint)
    yield Term("missed chunks that only the disk has", "disk", from_disk, bw.disk_read)


def prefill_terms(footprint: Footprint, outline: Outline, tokens: int, bw: Bandwidths, miss: float) -> Iterator[Term]:
    """A block of ``[prefill] block`` tokens of one row, on average over the whole context."""
    f, g, shape = footprint, footprint.geometry, footprint.shape
    block = min(g.block, tokens)
    m = _mean([moment(f, max(block, round(tokens * (i + 0.5) / SAMPLES)), block) for i in range(SAMPLES)])
    yield Term("weights", "device_memory", outline.weight_bytes, bw.device_memory)
    yield Term("summaries", "device_memory", m.summary_bytes, bw.device_memory)
    yield Term("attended K and V", "device_memory", m.attended_bytes, bw.device_memory)
    yield Term("layers", "matmul", 2.0 * outline.layer_parameters * block, bw.matmul)
    yield Term("attention", "matmul", 4.0 * shape.n_heads * shape.head_dim * m.attended * block, bw.matmul)
    choosing = len(g.choosing(block))
    yield Term("selection", "matmul", 2.0 * shape.n_heads * choosing * m.scored, bw.matmul)
    yield Term("fine codes of candidates", _link(f, "link_up"), m.fine_bytes, bw.link_up)
    yield Term("missed chunks", _link(f, "link_up"), miss * m.chosen * f.item_bytes, bw.link_up)
    share = block / tokens / f.rows
    leaving = share * f.chunks(tokens) * f.item_bytes
    yield Term("chunks that leave the window", _link(f, "link_down"), leaving, bw.link_down)
    disk = f.disk(tokens)
    if disk is not None and disk.chunks:
        yield Term("missed chunks that only the disk has", "disk", miss * m.chosen_on_disk * _record(f), bw.disk_read)
        yield Term("written to the disk", "disk", share * (disk.on_device - f.saved), bw.disk_append)


def _link(footprint: Footprint, direction: str) -> str:
    """What a transfer between the host pool and the device uses: on the CPU, where there is no link, the memory."""
    return direction if footprint.on_gpu else "device_memory"


def _record(footprint: Footprint) -> int:
    """Bytes that are read from the disk for one chunk of one KV head."""
    return footprint.layout.shard.record_bytes


def _mean(moments: list[Moment]) -> Moment:
    columns = zip(*(tuple(asdict(m).values()) for m in moments), strict=True)
    return Moment(*(sum(column) / len(moments) for column in columns))


def slowest(terms: list[Term]) -> tuple[str, float]:
    """The resource that takes the longest, and its seconds."""
    seconds: dict[str, float] = {}
    for term in terms:
        seconds[term.resource] = seconds.get(term.resource, 0.0) + term.seconds
    return max(seconds.items(), key=lambda item: item[1])


def rates(footprint: Footprint, outline: Outline, tokens: int, bw: Bandwidths, miss: float) -> dict[str, Any]:
    """The part "rates" of the plan.

    Parameters
    ----------
    miss : share of the chosen chunks that are not in the device pool, 0 to 1
    """
    g: Geometry = footprint.geometry
    prefill = [t for t in prefill_terms(footprint, outline, tokens, bw, miss) if t.amount]
    decode = [t for t in decode_terms(footprint, outline, tokens, bw, miss) if t.amount]
    bound, block_seconds = slowest(prefill)
    step_bound, step_seconds = slowest(decode)
    per_second = min(g.block, tokens) / block_seconds
    return {
        "miss": miss,
        "bandwidths": bw.report(),
        "prefill": {
            "tokens_per_s": per_second,
            "seconds": footprint.rows * tokens / per_second,
            "bound": bound,
            "block": min(g.block, tokens),
            "terms": [t.report() | {"arithmetic": t.arithmetic()} for t in prefill],
        },
        "decode": {
            "ms_per_token": 1e3 * step_seconds,
            "tokens_per_s": footprint.rows / step_seconds,
            "bound": step_bound,
            "terms": [t.report() | {"arithmetic": t.arithmetic()} for t in decode],
        },
    }
