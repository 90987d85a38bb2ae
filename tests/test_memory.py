"""What memory there is, with made-up cgroups, and how budgets are resolved against it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvtier import memory
from kvtier.config import BudgetConfig, Config
from kvtier.memory import (
    Available,
    Budgets,
    available_host,
    available_host_bytes,
    free_device_bytes,
    free_disk_bytes,
    resolve_budgets,
)
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import BudgetError, ConfigError, UnsupportedError

GIB = 2**30
V2 = ("memory.max", "memory.current")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def budget(**sizes: Any) -> BudgetConfig:
    return Config.load({"budget": sizes}).budget


def matching(*parts: str) -> str:
    """A regular expression for a message that holds the parts, literally and in this order."""
    return ".*".join(map(re.escape, parts))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GiB available to psutil."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100 * GIB))


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 GiB of host memory and 1,000 GiB of disk are free."""
    monkeypatch.setattr(memory, "available_host", lambda: Available(32 * GIB, "cgroup /sys/fs/cgroup/memory.max"))
    monkeypatch.setattr(memory, "free_disk_bytes", lambda path: 1000 * GIB)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 GiB of a CUDA device are free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB, 12 * GIB))


class Cgroups:
    """A made-up cgroup mount and the list of the process's own groups."""

    def __init__(self, folder: Path, own: str) -> None:
        self.root = folder / "cgroup"
        self.own = folder / "own"
        self.root.mkdir()
        self.own.write_text(own)

    def group(self, path: str, names: tuple[str, str], limit: object, usage: object, stat: str = "") -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{usage}\n")
        if stat:
            (folder / "memory.stat").write_text(stat)

    def available(self) -> Available:
        return available_host(self.root, self.own)


@pytest.mark.usefixtures("machine")
class TestAvailableHost:
    def test_no_cgroups(self, tmp_path: Path) -> None:
        assert available_host(tmp_path, tmp_path / "absent") == Available(100 * GIB, "psutil")

    def test_v2_limit_of_the_own_group(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/job\n")
        groups.group("job", V2, 10 * GIB, 4 * GIB)
        assert groups.available() == Available(6 * GIB, f"cgroup {groups.root}/job/memory.max")
        assert available_host_bytes(groups.root, groups.own) == 6 * GIB

    def test_v2_limit_of_a_parent(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/slice/job/step\n")
        groups.group("slice/job/step", V2, "max", 4 * GIB)
        groups.group("slice/job", V2, 50 * GIB, 5 * GIB)
        groups.group("slice", V2, 20 * GIB, 6 * GIB)
        assert groups.available() == Available(14 * GIB, f"cgroup {groups.root}/slice/memory.max")

    def test_v2_container_whose_own_group_is_the_root_of_the_mount(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/docker/0123abcd\n")
        groups.group("", V2, 3 * GIB, GIB)
        assert groups.available().bytes == 2 * GIB

    def test_v2_group_outside_the_namespace(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/../../other\n")
        (tmp_path.parent / "other").mkdir(exist_ok=True)
        groups.group("", V2, 3 * GIB, GIB)
        assert groups.available() == Available(2 * GIB, f"cgroup {groups.root}/memory.max")

    def test_v2_root_has_no_files(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/\n")
        assert groups.available() == Available(100 * GIB, "psutil")

    def test_reclaimable_file_cache_is_available(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/job\n")
        groups.group("job", V2, 10 * GIB, 9 * GIB, f"anon {2 * GIB}\nactive_file {GIB}\ninactive_file {6 * GIB}\n")
        assert groups.available().bytes == 7 * GIB

    def test_usage_above_the_limit_leaves_nothing(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/job\n")
        groups.group("job", V2, GIB, 2 * GIB)
        assert groups.available().bytes == 0

    @pytest.mark.parametrize("own", ["4:memory:/job\n", "7:cpu:/other\n4:hugetlb,memory:/job\n0::/\n"])
    def test_v1(self, tmp_path: Path, own: str) -> None:
        groups = Cgroups(tmp_path, own)
        groups.group("memory/job", V1, 10 * GIB, 8 * GIB, f"inactive_file 1\ntotal_inactive_file {GIB}\n")
        groups.group("memory", V1, 0x7FFFFFFFFFFFF000, 60 * GIB)
        groups.group("cpu/other", V1, 1, 1)
        assert groups.available() == Available(3 * GIB, f"cgroup {groups.root}/memory/job/memory.limit_in_bytes")

    def test_v1_without_a_limit(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "4:memory:/\n")
        groups.group("memory", V1, 0x7FFFFFFFFFFFF000, 60 * GIB)
        assert groups.available() == Available(100 * GIB, "psutil")

    def test_a_cgroup_above_the_machine_does_not_bind(self, tmp_path: Path) -> None:
        groups = Cgroups(tmp_path, "0::/job\n")
        groups.group("job", V2, 500 * GIB, GIB)
        assert groups.available().limit == "psutil"


class TestFree:
    def test_this_machine(self) -> None:
        assert 0 < available_host_bytes() < 2**50
        assert available_host().limit

    @pytest.mark.usefixtures("host", "card")
    def test_devices(self) -> None:
        assert free_device_bytes("cpu") == 32 * GIB
        assert free_device_bytes(torch.device("cuda", 0)) == 8 * GIB
        with pytest.raises(UnsupportedError, match=r'"cuda" devices and on the "cpu", not on "mps"'):
            free_device_bytes("mps")

    def test_the_disk_of_a_folder_that_does_not_exist_yet(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked = []

        def usage(path: Path) -> SimpleNamespace:
            asked.append(path)
            return SimpleNamespace(free=77)

        monkeypatch.setattr("shutil.disk_usage", usage)
        assert free_disk_bytes(tmp_path / "a" / "b") == 77
        assert free_disk_bytes(str(tmp_path)) == 77
        monkeypatch.chdir(tmp_path)
        assert free_disk_bytes("a/b") == 77
        assert asked == [tmp_path] * 3


@pytest.mark.usefixtures("host", "card")
class TestResolve:
    @pytest.mark.parametrize(
        ("sizes", "device", "store", "expected"),
        [
            ({}, "cuda", None, (6, 24, None)),
            ({}, "cuda:0", "/nvme", (6, 24, 750)),
            ({}, "cpu", None, (8, 16, None)),
            ({}, "cpu", "/nvme", (8, 16, 750)),
            ({"gpu": "50%", "host": "25%", "disk": "10%"}, "cuda", "/nvme", (4, 8, 100)),
            ({"gpu": "2GiB", "host": "3GiB", "disk": "4GiB"}, "cuda", "/nvme", (2, 3, 4)),
            ({"gpu": "2GiB", "host": "30GiB"}, "cpu", None, (2, 30, None)),
            ({"gpu": "25%", "host": "75%"}, "cpu", None, (8, 24, None)),
            ({"gpu": "100%", "host": "100%"}, "cuda", None, (8, 32, None)),
        ],
    )
    def test_values(
        self, sizes: dict[str, str], device: str, store: str | None, expected: tuple[int, int, int | None]
    ) -> None:
        gpu, host, disk = expected
        wanted = Budgets(gpu * GIB, host * GIB, None if disk is None else disk * GIB)
        assert resolve_budgets(budget(**sizes), device, store) == wanted

    @pytest.mark.parametrize(
        ("sizes", "expected"),
        [
            ({"host": "16GiB"}, (8, 16)),
            ({"host": "24GiB"}, (4, 24)),
            ({"gpu": "2GiB"}, (2, 16)),
            ({"gpu": "20GiB"}, (20, 8)),
        ],
    )
    def test_on_the_cpu_a_default_shrinks_to_what_the_other_leaves(
        self, sizes: dict[str, str], expected: tuple[int, int]
    ) -> None:
        gpu, host = expected
        assert resolve_budgets(budget(**sizes), "cpu", None) == Budgets(gpu * GIB, host * GIB, None)

    def test_disk_without_a_store(self) -> None:
        with pytest.raises(ConfigError, match=matching("[budget] disk = 300GiB has no store", "set [store] path")):
            resolve_budgets(budget(disk="300GiB"), "cpu", None)

    @pytest.mark.parametrize(
        ("key", "size", "free", "limit", "share"),
        [
            ("gpu", 9, 8, "free memory of cuda", 6),
            ("host", 48, 32, "cgroup /sys/fs/cgroup/memory.max", 24),
            ("disk", 1001, 1000, "free on the disk of /nvme", 750),
        ],
    )
    def test_more_than_is_available(self, key: str, size: int, free: int, limit: str, share: int) -> None:
        message = matching(
            f"[budget] {key} = {format_bytes(size * GIB)}, but only {format_bytes(free * GIB)} is available",
            f'({limit}): lower it or use a share such as "75%", which is {format_bytes(share * GIB)} now',
        )
        with pytest.raises(BudgetError, match=message):
            resolve_budgets(budget(**{key: f"{size}GiB"}), "cuda", "/nvme")

    @pytest.mark.parametrize("sizes", [{"gpu": "20GiB", "host": "16GiB"}, {"gpu": "62.5%", "host": "50%"}])
    def test_both_pools_of_the_cpu_fit_host_memory_together(self, sizes: dict[str, str]) -> None:
        gpu, host, total, there = (format_bytes(n * GIB) for n in (20, 16, 36, 32))
        message = matching(
            f"[budget] gpu = {gpu} + host = {host} = {total}, but on the CPU both are host memory, of which "
            f"only {there} is available (cgroup ",
            f"lower host to {format_bytes(12 * GIB)} or gpu to {format_bytes(16 * GIB)}",
        )
        with pytest.raises(BudgetError, match=message):
            resolve_budgets(budget(**sizes), "cpu", None)

    @pytest.mark.parametrize("key", ["gpu", "host"])
    def test_one_pool_of_the_cpu_above_host_memory(self, key: str) -> None:
        with pytest.raises(BudgetError, match=matching(f"[budget] {key} = ", "is available (cgroup ")):
            resolve_budgets(budget(**{key: "33GiB"}), "cpu", None)

    def test_another_device(self) -> None:
        with pytest.raises(UnsupportedError, match="move the model there"):
            resolve_budgets(budget(), "mps", None)
