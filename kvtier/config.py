"""The user's configuration: a TOML file, a dict with the same keys, or a `Config`, checked before any work.

`Config.load` reads and checks each value; `resolve_geometry` checks that they fit a model's trained window.
Every refusal names the key, what was expected, what was given and what to write instead.
"""

import difflib
import json
import os
import re
import tomllib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from kvtier.runtime.errors import ConfigError
from kvtier.runtime.geometry import Geometry

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *(B|KiB|MiB|GiB|TiB|%)")
_NEARLY_A_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgtKMGT])[A-Za-z]*\s*")
_SIZE_ADVICE = 'write for example "6GiB" (B, KiB, MiB, GiB, TiB), "75%", or a plain whole number of bytes'


@dataclass(frozen=True, slots=True)
class Size:
    """A number of bytes, or a share in percent of what is available; exactly one of the two is set."""

    bytes: int | None = None
    percent: float | None = None

    @classmethod
    def parse(cls, value: object, key: str = "size") -> "Size":
        """Read ``"6GiB"``, ``"1.5GiB"``, ``"4096B"``, ``"75%"`` or a plain int of bytes.

        Raises
        ------
        ConfigError
            Anything else, zero and negative sizes, shares outside (0, 100]; ``key`` is named in the message.
        """
        if isinstance(value, Size):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            size = cls(bytes=value)
        elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
            number, unit = match.groups()
            share = unit == "%"
            size = cls(percent=float(number)) if share else cls(bytes=int(Fraction(number) * _UNITS[unit]))
        else:
            nearly = _NEARLY_A_SIZE.fullmatch(value) if isinstance(value, str) else None
            meant = f'write "{nearly[1]}{nearly[2].upper()}iB" (B, KiB, MiB, GiB, TiB or %)' if nearly else ""
            raise ConfigError(f"{key} = {_show(value)} is not a size; {meant or _SIZE_ADVICE}")
        if size.percent is not None and not 0 < size.percent <= 100:
            raise ConfigError(f'{key} = {_show(value)}: a share is above 0% and at most 100%; for example "75%"')
        if size.bytes is not None and size.bytes < 1:
            raise ConfigError(f"{key} = {_show(value)}: a size is at least 1 byte; {_SIZE_ADVICE}")
        return size

    def resolve(self, available: int) -> int:
        """Bytes that are meant when ``available`` bytes are there; a number of bytes is returned as it is."""
        if self.bytes is not None:
            return self.bytes
        return int(available * Fraction(self.percent or 0) / 100)

    def __str__(self) -> str:
        if self.bytes is None:
            return f"{self.percent!r}%".replace(".0%", "%")
        unit, factor = next((u, f) for u, f in reversed(_UNITS.items()) if self.bytes % f == 0)
        return f"{self.bytes // factor}{unit}"


def _show(value: object) -> str:
    """Write a value as TOML does, for messages."""
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


# What a field accepts: called with the value and the full name of its key, returns what to keep or raises.
_Check = Callable[[object, str], object]


def _whole(minimum: int) -> _Check:
    def check(value: object, key: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            given = f"{_show(value)} is a {type(value).__name__}"
            raise ConfigError(f"{key} = {given}: a whole number is expected, at least {minimum}, without quotes")
        if value < minimum:
            raise ConfigError(f"{key} = {value} is too small: it is at least {minimum}")
        return value

    return check


def _choice(*allowed: str | int) -> _Check:
    def check(value: object, key: str) -> object:
        if type(value) not in (str, int) or value not in allowed:
            hint = _did_you_mean(value, [a for a in allowed if isinstance(a, str)])
            choices = ", ".join(map(_show, allowed))
            raise ConfigError(f"{key} = {_show(value)} is not a choice{hint}; choose one of {choices}")
        return value

    return check


def _kind(value: object, key: str) -> object:
    return value if value == "sketch" else _choice(*summary_kinds())(value, key)  # the default loads nothing


def _path(value: object, key: str) -> str:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or not text:
        raise ConfigError(f'{key} = {_show(value)} is not a path; write a directory, such as "/nvme/kvtier"')
    return os.path.expanduser(text)


def summary_kinds() -> tuple[str, ...]:
    """Names that ``[summary] kind`` accepts: the keys of `kvtier.runtime.summary.KINDS`, imported late."""
    from kvtier.runtime.summary import KINDS

    return tuple(KINDS)


class _Section:
    """Base of the TOML tables: checks every given field, from a file, a dict or a constructor alike."""

    __slots__ = ()
    checks: ClassVar[dict[str, _Check]]

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        for f in fields(cast(Any, self)):
            value = getattr(self, f.name)
            if value is not None or f.default is not None:
                object.__setattr__(self, f.name, self.checks[f.name](value, f"[{name}] {f.name}"))


@dataclass(frozen=True, slots=True)
class BudgetConfig(_Section):
    """``[budget]``: ceilings of what kvtier allocates; None is derived by `kvtier.memory.resolve_budgets`."""

    checks: ClassVar[dict[str, _Check]] = dict.fromkeys(("gpu", "host", "disk"), Size.parse)
    gpu: Size | None = None
    host: Size | None = None
    disk: Size | None = None


@dataclass(frozen=True, slots=True)
class StoreConfig(_Section):
    """``[store]``: the directory of the disk tier (None: there is none) and how chunks are stored."""

    checks: ClassVar[dict[str, _Check]] = {
        "path": _path,
        "mode": _choice("durable", "spill"),
        "dtype": _choice("auto", "int8", "int4"),
    }
    path: str | None = None
    """``~`` is expanded; a relative path counts from the working directory."""
    mode: Literal["durable", "spill"] = "spill"
    dtype: Literal["auto", "int8", "int4"] = "auto"

    @property
    def bits(self) -> int | None:
        """Bits a number of chunks on host and disk; None: the model's own."""
        return {"auto": None, "int8": 8, "int4": 4}[self.dtype]


@dataclass(frozen=True, slots=True)
class AttentionConfig(_Section):
    """``[attention]``, in tokens; None follows from the model's trained window, see `resolve_geometry`."""

    checks: ClassVar[dict[str, _Check]] = {
        "method": _choice("chunks", "reattention"),
        "sink": _whole(0),
        "select": _whole(0),
        **dict.fromkeys(("max", "local", "chunk", "picks"), _whole(1)),
    }
    method: Literal["chunks", "reattention"] = "chunks"
    max: int | None = None
    sink: int | None = None
    local: int | None = None
    chunk: int | None = None
    select: int | None = None
    picks: int = 4
    """Tokens that each query head picks (the paper's k); method "reattention" only."""


@dataclass(frozen=True, slots=True)
class SummaryConfig(_Section):
    """``[summary]``: what the GPU keeps of the keys of every chunk."""

    checks: ClassVar[dict[str, _Check]] = {
        "kind": _kind,
        "bits": _choice(2, 4, 8),
        "levels": _choice(1, 2),
        **dict.fromkeys(("rank", "overfetch"), _whole(1)),
    }
    kind: str = "sketch"
    rank: int = 16
    bits: Literal[2, 4, 8] = 4
    levels: Literal[1, 2] = 1
    """2: sketches lie on the host, and a byte per token and KV head on the GPU proposes which of them are scored."""
    overfetch: int = 8
    """Of two levels: candidates for each chunk that is chosen."""


@dataclass(frozen=True, slots=True)
class PrefillConfig(_Section):
    """``[prefill]``, in tokens; None follows from the model's trained window, see `resolve_geometry`."""

    checks: ClassVar[dict[str, _Check]] = dict.fromkeys(("block", "queries", "tail"), _whole(1))
    block: int | None = None
    queries: int = 16
    tail: int | None = None


_SECTIONS: dict[str, type[Any]] = {
    "budget": BudgetConfig,
    "store": StoreConfig,
    "attention": AttentionConfig,
    "summary": SummaryConfig,
    "prefill": PrefillConfig,
}


@dataclass(frozen=True, slots=True)
class Config:
    """Everything a user can set. ``str(config)`` is the TOML of what differs from the defaults."""

    budget: BudgetConfig = field(default_factory=BudgetConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    summary: SummaryConfig = field(default_factory=SummaryConfig)
    prefill: PrefillConfig = field(default_factory=PrefillConfig)

    def __post_init__(self) -> None:
        for name, kind in _SECTIONS.items():
            if not isinstance(given := getattr(self, name), kind):
                expected = f"a {kind.__name__}, not a {type(given).__name__}; Config.load reads dicts"
                raise ConfigError(f"Config({name}=...) takes {expected}")

    @classmethod
    def load(cls, source: "str | os.PathLike[str] | Mapping[str, object] | Config | None" = None) -> "Config":
        """Read the path of a TOML file, a nested dict, a `Config` (returned as it is) or None (defaults).

        Raises
        ------
        ConfigError
            File missing, unreadable or no TOML; unknown section or key; a value of the wrong type or range.
        """
        if isinstance(source, Config):
            return source
        if source is None or isinstance(source, Mapping):
            return _from_mapping(source or {})
        if not isinstance(source, str | os.PathLike):
            expected = "the path of a TOML file, a dict, a kvtier.Config or None"
            raise ConfigError(f"a configuration is {expected}, not {_show(source)}")
        path = Path(source).expanduser().absolute()
        table = _read_toml(path)
        try:
            return _from_mapping(table)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_dict(self) -> dict[str, dict[str, str | int]]:
        """Return what differs from the defaults, as a nested dict that `load` reads back."""
        tables: dict[str, dict[str, str | int]] = {}
        for name in _SECTIONS:
            section = getattr(self, name)
            for f in fields(section):
                if (value := getattr(section, f.name)) != f.default:
                    tables.setdefault(name, {})[f.name] = str(value) if isinstance(value, Size) else value
        return tables

    def to_toml(self) -> str:
        """Return `to_dict` as the text of a TOML file."""
        tables = (
            f"[{name}]\n" + "".join(f"{key} = {_show(value)}\n" for key, value in table.items())
            for name, table in self.to_dict().items()
        )
        return "\n".join(tables).replace("\x7f", "\\u007f")  # JSON strings may hold this one bare, TOML's not

    def __str__(self) -> str:
        return self.to_toml() or "# kvtier defaults\n"


def _from_mapping(table: Mapping[str, object]) -> Config:
    """Check names and build the sections; None as a value means "not given"."""
    sections: dict[str, Any] = {}
    for name, values in table.items():
        if name not in _SECTIONS:
            raise ConfigError(_unknown(name, f"[{name}]", "section", list(_SECTIONS)))
        if values is None:
            continue
        keys = list(_SECTIONS[name].checks)
        if not isinstance(values, Mapping):
            raise ConfigError(f"[{name}] = {_show(values)}: a table of keys is expected ({', '.join(keys)})")
        for key in values:
            if key not in keys:
                raise ConfigError(_unknown(key, f"[{name}] {key}", "key", keys))
        sections[name] = _SECTIONS[name](**{key: v for key, v in values.items() if v is not None})
    return Config(**sections)


def _did_you_mean(given: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1) if isinstance(given, str) else []
    return f', did you mean "{close[0]}"?' if close else ""


def _unknown(given: object, shown: str, what: str, known: Sequence[str]) -> str:
    """Say what name does not exist, and if another section has it."""
    home = next((f", it belongs to [{name}]" for name, kind in _SECTIONS.items() if given in kind.checks), "")
    return f"{shown} is an unknown {what}{home or _did_you_mean(given, known)} (known: {', '.join(known)})"


def _read_toml(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        expected = 'the path of a TOML file, a dict with the same keys, such as {"budget": {"gpu": "6GiB"}}'
        raise ConfigError(f"no configuration file at {path}: give {expected}, or nothing") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read as UTF-8 text: {error}") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        at = re.search(r"line (\d+)", str(error))
        line = at[1] if at else text.count("\n") + 1
        raise ConfigError(f"{path}, line {line}: not valid TOML: {error}") from error


def resolve_geometry(config: Config, window: int) -> Geometry:
    """Fill in what ``[attention]`` and ``[prefill]`` leave open, for a trained window of ``window`` tokens.

    Not given: max = min(window, 8192), sink 32, chunk 32, block = min(1024, max / 8), tail = min(64, block);
    half of the rest, max - sink - (chunk - 1) - block, is selected and the remainder is local. Where one of
    select and local is given, the other gets what that leaves of the rest. Warns if nothing is left to
    select, unless select = 0 was given.

    Raises
    ------
    ConfigError
        The values do not fit in max, or max in the window; the message has the arithmetic and what would fit.
    """
    attention, prefill = config.attention, config.prefill
    max_ = _or(attention.max, min(window, 8192))
    if max_ > window:
        advice = f"lower it to {window} or less, or leave it out"
        raise ConfigError(f"[attention] max = {max_} exceeds the model's trained window of {window}: {advice}")
    sink, chunk = _or(attention.sink, 32), _or(attention.chunk, 32)
    block = _or(prefill.block, max(1, min(1024, max_ // 8)))
    rest, select, local = max_ - sink - (chunk - 1) - block, attention.select, attention.local
    if select is None:
        select = max(0, (rest // 2 if local is None else rest - local) // chunk)
    if local is None:
        local = rest - select * chunk  # below 1 where the others leave nothing: refused below
    tail = _or(prefill.tail, min(64, block))
    geometry = Geometry(max_, sink, local, chunk, select, block, prefill.queries, tail)
    _check_fit(geometry, window)
    _check_blocks(geometry, attention.method)
    if select == 0 and attention.select is None:
        values = f"max {max_}, sink {sink}, local {local}, chunk {chunk}, [prefill] block {block}"
        advice = "raise max, lower the others, or set select = 0 if this is meant"
        message = f"no chunk can be selected, sinks and window alone remain, with [attention] {values}: {advice}"
        warnings.warn(message, stacklevel=2)
    return geometry


def _or(given: int | None, derived: int) -> int:
    return derived if given is None else given


def _check_fit(g: Geometry, window: int) -> None:
    """Refuse a bound above max, and a derived local below 1: then the least local, 1, exceeds max too."""
    local = max(1, g.local)
    bound = g.bound - g.local + local
    if bound <= g.max:
        return
    rest = g.max - g.sink - (g.chunk - 1) - g.block
    fits = [f"local to {rest - g.select * g.chunk}"] if rest > g.select * g.chunk else []
    fits += [f"select to {(rest - local) // g.chunk}"] if rest >= local else []
    advice = "lower " + (" or ".join(fits) or "sink, chunk or [prefill] block")
    advice += f", or raise max to {bound} with [prefill] block {g.block}" if bound <= window else ""
    chunks = f"sink {g.sink} + select {g.select} x chunk {g.chunk}"
    total = f"{chunks} + local {local} + chunk - 1 + block {g.block} = {bound}"
    raise ConfigError(f"{total} > [attention] max {g.max}; {advice}")


def _check_blocks(g: Geometry, method: str) -> None:
    if g.tail > g.block:
        advice = f"lower tail to {g.block} or less, or raise [prefill] block to {g.tail}"
        raise ConfigError(f"[prefill] tail = {g.tail} is longer than a block of {g.block} tokens: {advice}")
    if method == "reattention" and g.local < g.block:
        why = "its local window contains the block"
        advice = f"raise local to {g.block}, or lower block to {g.local}"
        needs = f"local >= [prefill] block ({why}), but local is {g.local} and block is {g.block}"
        raise ConfigError(f'[attention] method = "reattention" needs {needs}: {advice}')
