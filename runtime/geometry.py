"""Which tokens are sink, chunk, window and block: the integer arithmetic of DESIGN.md, "Exact definitions".

Pure integers, no tensors: everything else asks this class where a token is.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """The resolved ``[attention]`` and ``[prefill]`` values of one offload block, all in tokens.

    A sequence is ``[sink | middle chunks | window]``; a block of new tokens attends to the sinks, to at most ``select``
    chunks per KV head, to the window and to itself.
    """

    max: int
    """Attended tokens of one step, at most; never above the trained window."""
    sink: int
    local: int
    """A chunk can be selected once at least this many tokens lie between its end and the block."""
    chunk: int
    select: int
    """Chunks attended per KV head and step; 0 leaves sinks and window alone."""
    block: int
    queries: int
    tail: int

    @property
    def bound(self) -> int:
        """The longest attended length that any step can have."""
        return self.sink + self.select * self.chunk + self.window_capacity

    @property
    def window_capacity(self) -> int:
        """Most tokens held after the last complete selectable chunk, the block itself included."""
        return self.local + self.chunk - 1 + self.block

    def selectable(self, start: int) -> int:
        """How many middle chunks a block that starts at token ``start`` can select: those that end by start - local."""
        return max(0, (start - self.local - self.sink) // self.chunk)

    def window_start(self, start: int) -> int:
        """First token of the window of a block at ``start``: just after the last selectable chunk."""
        return self.sink + self.selectable(start) * self.chunk

    def schedule(self, n: int) -> list[tuple[int, int]]:
        """Blocks ``(begin, end)`` in which ``n`` new tokens are processed, relative to the first of them.

        Blocks of ``block`` tokens, then the ``tail`` tokens before the last as one block, then the last token alone.
        """
        last = n - 1
        tail_begin = max(0, last - self.tail)
        blocks = [(begin, min(begin + self.block, tail_begin)) for begin in range(0, tail_begin, self.block)]
        if tail_begin < last:
            blocks.append((tail_begin, last))
        blocks.append((last, n))
        return blocks

    def choosing(self, n: int) -> list[int]:
        """Indices of the queries of a block of ``n`` tokens that choose its chunks.

        All in blocks of up to 64 tokens; else ``queries`` of them, evenly spaced, the last of each stretch.
        """
        if n <= ALL_QUERIES_CHOOSE:
            return list(range(n))
        count = min(self.queries, n)
        return [(i + 1) * n // count - 1 for i in range(count)]


ALL_QUERIES_CHOOSE = 64
"""Blocks of up to this many tokens choose with all their queries."""
