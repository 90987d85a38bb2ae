"""Hard byte budgets: one ``Budget`` per key of ``[budget]``, shared by all that allocates under that key."""

from kvtier.runtime.errors import BudgetError


class Budget:
    """A ceiling on bytes. Users take before they allocate and give back after they free.

    Parameters
    ----------
    name
        The key in ``[budget]``: "gpu", "host" or "disk".
    limit_bytes
        Most bytes that can be in use at once.
    """

    def __init__(self, name: str, limit_bytes: int) -> None:
        assert limit_bytes >= 0, f"budget {name} of {limit_bytes} bytes"
        self.name = name
        self.limit_bytes = limit_bytes
        self._used_bytes = 0
        self._aside_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes taken and not yet given back; never above ``limit_bytes``."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes that can still be taken."""
        return self.limit_bytes - self._used_bytes - self._aside_bytes

    @property
    def aside_bytes(self) -> int:
        """Bytes set aside and not in use."""
        return self._aside_bytes

    def set_aside(self, nbytes: int) -> None:
        """Keep ``nbytes`` for those who call ``take_aside``. Raises BudgetError if less is free."""
        if nbytes > self.free_bytes:
            raise self.refusal(nbytes, "what is set aside")
        self._aside_bytes += nbytes

    def take_aside(self, nbytes: int, what: str) -> int:
        """Like ``take``, from what is set aside first; returns how much of ``nbytes`` came from there."""
        from_aside = min(nbytes, self._aside_bytes)
        self.take(nbytes - from_aside, what)
        self._aside_bytes -= from_aside
        self._used_bytes += from_aside
        return from_aside

    def give_aside(self, nbytes: int, from_aside: int) -> None:
        """Give back what ``take_aside`` took."""
        self.give(nbytes)
        self._aside_bytes += from_aside

    def take(self, nbytes: int, what: str) -> None:
        """Reserve ``nbytes`` for ``what``, words that fit after "1 MiB for".

        Raises BudgetError, with nothing taken, if less than ``nbytes`` is free.
        """
        assert nbytes >= 0, f"taking {nbytes} bytes for {what}"
        if nbytes > self.free_bytes:
            raise self.refusal(nbytes, what)
        self._used_bytes += nbytes

    def give(self, nbytes: int) -> None:
        """Give back ``nbytes`` that were taken before."""
        assert 0 <= nbytes <= self._used_bytes, f"giving {nbytes} of {self._used_bytes} bytes in use"
        self._used_bytes -= nbytes

    def refusal(self, nbytes: int, what: str) -> BudgetError:
        """The error that says why ``nbytes`` for ``what`` do not fit."""
        return BudgetError(
            f"[budget] {self.name} = {format_bytes(self.limit_bytes)} is too small: "
            f"{format_bytes(self._used_bytes)} in use, {format_bytes(nbytes)} needed for {what}. "
            f"Raise [budget] {self.name} by at least {format_bytes(nbytes - self.free_bytes)}, "
            "or use shorter contexts, fewer sequences at a time or a smaller [store] dtype."
        )


def format_bytes(nbytes: int) -> str:
    """``nbytes`` for people, in binary units: "512 B", "1.50 GiB"."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    size, unit = nbytes / 1024, "KiB"
    for larger in ("MiB", "GiB", "TiB"):
        if abs(size) < 1023.995:  # from there on it would be printed as 1024.00
            break
        size, unit = size / 1024, larger
    return f"{size:.2f} {unit}"
