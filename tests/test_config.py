"""The configuration: what is read, and every refusal with its message."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from kvtier.config import (
    AttentionConfig,
    BudgetConfig,
    Config,
    PrefillConfig,
    Size,
    StoreConfig,
    SummaryConfig,
    summary_kinds,
)
from kvtier.runtime.errors import ConfigError

no_deadline = settings(deadline=None)  # CI machines stall

EXAMPLE = """
[budget]                   # hard ceilings on what kvtier itself allocates; weights are not counted
gpu  = "6GiB"
host = "48GiB"             # also bounded by min(psutil available, the cgroup's memory limit)
disk = "300GiB"
[store]
path = "/nvme/kvtier"      # directory of the zarr store; absent = no disk tier
mode = "durable"           # "durable": everything is written, sessions can be reopened | "spill"
dtype = "int4"             # of host and disk chunks: "auto" (the model's own, the default) | "int8" | "int4"
[attention]                # defaults follow from the model's trained window, see Exact definitions
method = "chunks"          # "chunks" | "reattention"
max = 8192                 # attended tokens, at most
sink = 32                  # first tokens, always attended
local = 3072               # last tokens, always attended
chunk = 32                 # tokens per chunk
select = 96                # chunks attended per KV head and step
[summary]
kind = "sketch"            # "sketch" | "cuboid" | "minmax" | "mean" | "exact"
rank = 16
bits = 4
[prefill]
block = 1024               # prompt tokens per forward
queries = 16               # queries of a block that choose its chunks
tail = 64                  # last tokens of an input, a block of their own
"""

GIB = 2**30


def refused(*parts: str) -> Any:
    """``pytest.raises`` for a message that holds the parts, literally and in this order."""
    return pytest.raises(ConfigError, match="(?s)" + ".*".join(map(re.escape, parts)))


class TestSize:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("6GiB", 6 * GIB),
            ("1.5GiB", 3 * GIB // 2),
            ("512MiB", 512 * 2**20),
            ("64KiB", 65536),
            ("2TiB", 2 * 2**40),
            ("4096B", 4096),
            ("6 GiB", 6 * GIB),
            (4096, 4096),
        ],
    )
    def test_bytes(self, text: object, size: int) -> None:
        assert Size.parse(text) == Size(bytes=size)
        assert Size.parse(text).resolve(1) == size

    @pytest.mark.parametrize(
        ("text", "available", "size"),
        [("75%", 1000, 750), ("100%", 12345, 12345), ("12.5%", 80, 10), ("50%", 3, 1)],
    )
    def test_shares_of_what_is_available(self, text: str, available: int, size: int) -> None:
        assert Size.parse(text).resolve(available) == size

    def test_a_share_of_a_large_disk_is_exact(self) -> None:
        assert Size.parse("100%").resolve(2**60 + 1) == 2**60 + 1

    @pytest.mark.parametrize(
        ("text", "advice"),
        [
            ("6GB", '"6GiB"'),
            ("6G", '"6GiB"'),
            ("6 gigs", '"6GiB"'),
            ("6gib", '"6GiB"'),
            ("512 MB", '"512MiB"'),
            ("1.5tb", '"1.5TiB"'),
            ("64k", '"64KiB"'),
        ],
    )
    def test_a_wrong_unit_is_refused_with_the_right_one(self, text: str, advice: str) -> None:
        with refused(f'[budget] gpu = "{text}" is not a size; write {advice}'):
            Config.load({"budget": {"gpu": text}})

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            ("", '""'),
            ("much", '"much"'),
            ("6", '"6"'),
            ("-6GiB", '"-6GiB"'),
            ("1e9B", '"1e9B"'),
            ("6GiB!", '"6GiB!"'),
            (1.5, "1.5"),
            (True, "true"),
            (["6GiB"], "['6GiB']"),
        ],
    )
    def test_what_is_no_size_is_refused(self, value: object, shown: str) -> None:
        with refused(f'[budget] host = {shown} is not a size; write for example "6GiB"'):
            Config.load({"budget": {"host": value}})

    @pytest.mark.parametrize(("value", "shown"), [(0, "0"), (-1, "-1"), ("0GiB", '"0GiB"'), ("0.1B", '"0.1B"')])
    def test_nothing_is_refused(self, value: object, shown: str) -> None:
        with refused(f"[budget] disk = {shown}: a size is at least 1 byte"):
            Config.load({"budget": {"disk": value}})

    @pytest.mark.parametrize("value", ["0%", "100.1%", "750%"])
    def test_a_share_is_above_0_and_at_most_100(self, value: str) -> None:
        with refused(f'[budget] gpu = "{value}": a share is above 0% and at most 100%'):
            Config.load({"budget": {"gpu": value}})

    @no_deadline
    @given(st.integers(1, 2**50))
    def test_str_of_bytes_reads_back(self, size: int) -> None:
        assert Size.parse(str(Size(bytes=size))) == Size(bytes=size)

    @no_deadline
    @given(st.decimals(min_value="0.01", max_value=100, places=2))
    def test_str_of_a_share_reads_back(self, percent: Any) -> None:
        size = Size.parse(f"{percent}%")
        assert Size.parse(str(size)) == size

    @pytest.mark.parametrize("text", ["6GiB", "1536MiB", "4097B", "75%", "12.5%"])
    def test_str_is_what_was_written(self, text: str) -> None:
        assert str(Size.parse(text)) == text


class TestLoad:
    def test_the_example_of_the_design(self, tmp_path: Path) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_text(EXAMPLE)
        config = Config.load(path)
        assert config == Config(
            BudgetConfig(Size(bytes=6 * GIB), Size(bytes=48 * GIB), Size(bytes=300 * GIB)),
            StoreConfig("/nvme/kvtier", "durable", "int4"),
            AttentionConfig("chunks", 8192, 32, 3072, 32, 96),
            SummaryConfig("sketch", 16, 4),
            PrefillConfig(1024, 16, 64),
        )

    @pytest.mark.parametrize("source", [None, {}, {"attention": {}}, {"attention": {"max": None}, "store": None}])
    def test_nothing_given_means_defaults(self, source: Any) -> None:
        config = Config.load(source)
        assert config == Config()
        assert (config.budget.gpu, config.store.path, config.store.mode) == (None, None, "spill")
        assert (config.store.dtype, config.attention.method, config.attention.picks) == ("auto", "chunks", 4)
        assert (config.summary.kind, config.summary.rank, config.summary.bits) == ("sketch", 16, 4)
        assert (config.prefill.block, config.prefill.queries, config.prefill.tail) == (None, 16, None)

    def test_a_config_is_returned_as_it_is(self) -> None:
        config = Config(prefill=PrefillConfig(block=8))
        assert Config.load(config) is config

    def test_path_forms(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "kvtier.toml").write_bytes(b"\xef\xbb\xbf[attention]\r\nselect = 3\r\n")  # a Windows editor's
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        expected = Config(attention=AttentionConfig(select=3))
        for source in ("kvtier.toml", "~/kvtier.toml", str(tmp_path / "kvtier.toml"), Path("kvtier.toml")):
            assert Config.load(source) == expected

    def test_a_store_path_is_a_str_with_the_home_directory_filled_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        assert Config.load({"store": {"path": "~/kv"}}).store.path == "/home/me/kv"
        assert Config.load({"store": {"path": Path("/nvme/kv")}}).store.path == "/nvme/kv"

    def test_sections_check_what_their_constructors_get(self) -> None:
        sizes: Any = {"gpu": "6GiB", "host": 4096}
        assert BudgetConfig(**sizes) == BudgetConfig(gpu=Size(bytes=6 * GIB), host=Size(bytes=4096))
        with refused("[attention] select = -1 is too small: it is at least 0"):
            AttentionConfig(select=-1)
        table: Any = {"max": 3}
        with refused("Config(attention=...) takes a AttentionConfig, not a dict; Config.load reads dicts"):
            Config(attention=table)

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Config().attention.max = 3  # type: ignore[misc]


class TestFiles:
    def test_missing_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with refused(f"no configuration file at {tmp_path / 'absent.toml'}", "a dict with the same keys"):
            Config.load("absent.toml")

    def test_a_directory(self, tmp_path: Path) -> None:
        with refused(f"{tmp_path} cannot be read as UTF-8 text", "Is a directory"):
            Config.load(tmp_path)

    def test_not_text(self, tmp_path: Path) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_bytes(b"\xff\xfe\x00")
        with refused(f"{path} cannot be read as UTF-8 text"):
            Config.load(path)

    @pytest.mark.parametrize(
        ("text", "line"),
        [('[budget]\ngpu = "6GiB\nhost = 3\n', 2), ("[budget]\ngpu = 6GiB\n", 2), ("[budget]\n\n[budget", 3)],
    )
    def test_syntax_error_has_file_and_line(self, tmp_path: Path, text: str, line: int) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_text(text)
        with refused(f"{path}, line {line}: not valid TOML: "):
            Config.load(path)

    def test_a_bad_value_names_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "kvtier.toml"
        path.write_text("[attention]\nselect = '96'\n")
        with refused(f'{path}: [attention] select = "96" is a str'):
            Config.load(path)

    @pytest.mark.parametrize("source", [3, b"kvtier.toml", ["kvtier.toml"], True])
    def test_something_else(self, source: Any) -> None:
        with refused("a configuration is the path of a TOML file, a dict, a kvtier.Config or None, not "):
            Config.load(source)


class TestNames:
    def test_unknown_section(self) -> None:
        with refused(
            '[atention] is an unknown section, did you mean "attention"? '
            "(known: budget, store, attention, summary, prefill)"
        ):
            Config.load({"atention": {}})

    def test_unknown_section_that_resembles_nothing(self) -> None:
        with refused("[zzz] is an unknown section (known: budget, "):
            Config.load({"zzz": {}})

    def test_a_key_outside_its_section(self) -> None:
        with refused("[local] is an unknown section, it belongs to [attention]"):
            Config.load({"local": 3})
        with refused("[attention] block is an unknown key, it belongs to [prefill] (known: "):
            Config.load({"attention": {"block": 3}})

    def test_unknown_key(self) -> None:
        with refused('[attention] selct is an unknown key, did you mean "select"? (known: ', "picks"):
            Config.load({"attention": {"selct": 3}})

    def test_a_section_that_is_no_table(self) -> None:
        with refused('[budget] = "6GiB": a table of keys is expected (gpu, host, disk)'):
            Config.load({"budget": "6GiB"})

    def test_names_that_are_no_strings(self) -> None:
        names: Any = {3: {}}
        with refused("[3] is an unknown section"):
            Config.load(names)


class TestValues:
    @pytest.mark.parametrize(
        ("value", "given"),
        [("96", '"96" is a str'), (True, "true is a bool"), (96.0, "96.0 is a float"), ([], "[] is")],
    )
    @pytest.mark.parametrize(
        ("section", "key"),
        [
            *(("attention", key) for key in ("max", "sink", "local", "chunk", "select", "picks")),
            *(("prefill", key) for key in ("block", "queries", "tail")),
            ("summary", "rank"),
        ],
    )
    def test_a_whole_number_is_expected(self, section: str, key: str, value: object, given: str) -> None:
        with refused(f"[{section}] {key} = {given}", "a whole number is expected"):
            Config.load({section: {key: value}})

    @pytest.mark.parametrize(
        ("section", "key", "value", "least"),
        [
            ("attention", "max", 0, 1),
            ("attention", "sink", -1, 0),
            ("attention", "local", 0, 1),
            ("attention", "chunk", 0, 1),
            ("attention", "select", -1, 0),
            ("attention", "picks", 0, 1),
            ("summary", "rank", 0, 1),
            ("prefill", "block", 0, 1),
            ("prefill", "queries", 0, 1),
            ("prefill", "tail", 0, 1),
        ],
    )
    def test_a_number_too_small(self, section: str, key: str, value: int, least: int) -> None:
        with refused(f"[{section}] {key} = {value} is too small: it is at least {least}"):
            Config.load({section: {key: value}})
        Config.load({section: {key: least}})

    @pytest.mark.parametrize(
        ("section", "key", "value", "message"),
        [
            (
                "store",
                "mode",
                "spil",
                '"spil" is not a choice, did you mean "spill"?; choose one of "durable", "spill"',
            ),
            ("store", "dtype", "fp8", '"fp8" is not a choice; choose one of "auto", "int8", "int4"'),
            ("attention", "method", 3, '3 is not a choice; choose one of "chunks", "reattention"'),
            ("summary", "bits", 3, "3 is not a choice; choose one of 2, 4, 8"),
            ("summary", "bits", 4.0, "4.0 is not a choice"),
            ("summary", "bits", True, "true is not a choice"),
            ("store", "mode", ["spill"], "['spill'] is not a choice"),
        ],
    )
    def test_choices(self, section: str, key: str, value: object, message: str) -> None:
        with refused(f"[{section}] {key} = {message}"):
            Config.load({section: {key: value}})

    @pytest.mark.parametrize("value", ["", 3, False, b"/nvme"])
    def test_store_path(self, value: object) -> None:
        with refused("[store] path = ", 'is not a path; write a directory, such as "/nvme/kvtier"'):
            Config.load({"store": {"path": value}})

    def test_every_kind_of_summary_is_accepted(self) -> None:
        assert {"exact", "sketch"} <= set(summary_kinds())
        for kind in summary_kinds():
            assert Config.load({"summary": {"kind": kind}}).summary.kind == kind

    def test_unknown_kind_of_summary(self) -> None:
        with refused('[summary] kind = "skech" is not a choice, did you mean "sketch"?', '"exact"'):
            Config.load({"summary": {"kind": "skech"}})


def configs() -> st.SearchStrategy[Config]:
    sizes = st.none() | st.builds(Size, bytes=st.integers(1, 2**50)) | st.builds(Size, percent=st.just(12.5))
    paths = st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(lambda text: "/" + text)
    some = st.none() | st.integers(1, 10**6)
    return st.builds(
        Config,
        st.builds(BudgetConfig, sizes, sizes, sizes),
        st.builds(
            StoreConfig,
            paths,
            st.sampled_from(["durable", "spill"]),
            st.sampled_from(["auto", "int8", "int4"]),
        ),
        st.builds(AttentionConfig, st.sampled_from(["chunks", "reattention"]), some, some, some, some, some),
        st.builds(SummaryConfig, st.just("sketch"), st.integers(1, 64), st.sampled_from([2, 4, 8])),
        st.builds(PrefillConfig, some, st.integers(1, 64), some),
    )


class TestRoundTrip:
    @no_deadline
    @given(configs())
    def test_dict_and_file(self, tmp_path_factory: pytest.TempPathFactory, config: Config) -> None:
        assert Config.load(config.to_dict()) == config
        path = tmp_path_factory.getbasetemp() / "round-trip.toml"
        path.write_bytes(str(config).encode())
        assert Config.load(path) == config

    def test_only_what_differs_from_the_defaults_is_written(self) -> None:
        config = Config.load({"budget": {"gpu": "1.5GiB"}, "attention": {"select": 0}, "summary": {"rank": 16}})
        assert config.to_dict() == {"budget": {"gpu": "1536MiB"}, "attention": {"select": 0}}
        assert str(config) == '[budget]\ngpu = "1536MiB"\n\n[attention]\nselect = 0\n'
        assert str(Config()) == "# kvtier defaults\n"
