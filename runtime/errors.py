"""The errors that a user of kvtier can meet. Each message says what was expected, what was given and what to do."""


class KvtierError(Exception):
    """Base of every error that kvtier raises on purpose."""


class ConfigError(KvtierError, ValueError):
    """A configuration that cannot be used: unknown key, wrong unit, values that do not fit together."""


class BudgetError(KvtierError, MemoryError):
    """A byte budget of ``[budget]`` is too small for what was asked, or the machine cannot hold it."""


class StoreError(KvtierError, OSError):
    """The disk store cannot be written or read (missing rights, full device, foreign content)."""


class UnsupportedError(KvtierError, NotImplementedError):
    """A model, an argument or a way of calling that kvtier does not serve (yet)."""
