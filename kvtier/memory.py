"""How much memory there is, and the byte budgets of ``[budget]`` resolved against it before any work."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from kvtier.config import BudgetConfig, Size
from kvtier.runtime.budget import format_bytes
from kvtier.runtime.errors import BudgetError, ConfigError, StoreError, UnsupportedError

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Available:
    """Bytes that can be allocated now, and the name of the limit that says so, for messages."""

    bytes: int
    limit: str


@dataclass(frozen=True, slots=True)
class Budgets:
    """The ceilings of one offload block, in bytes; ``disk_bytes`` is None without a store."""

    gpu_bytes: int
    host_bytes: int
    disk_bytes: int | None


def available_host(cgroup_root: Path = CGROUP_ROOT, proc_cgroup: Path = PROC_CGROUP) -> Available:
    """Host memory that this process can still allocate: the least of psutil's figure and every cgroup limit.

    A cgroup's inactive file cache counts as available, as in psutil's figure: it is reclaimed before an
    allocation fails.

    Parameters
    ----------
    cgroup_root, proc_cgroup
        Where the cgroup file systems are mounted, and the list of the process's own groups; for tests.
    """
    machine = Available(psutil.virtual_memory().available, "psutil")
    return min([machine, *_cgroup_limits(cgroup_root, proc_cgroup)], key=lambda limit: limit.bytes)


def available_host_bytes(cgroup_root: Path = CGROUP_ROOT, proc_cgroup: Path = PROC_CGROUP) -> int:
    """Return the bytes of `available_host`."""
    return available_host(cgroup_root, proc_cgroup).bytes


def free_device_bytes(device: torch.device | str) -> int:
    """Bytes free on a CUDA device; for the CPU, `available_host_bytes`.

    Raises
    ------
    UnsupportedError
        Another type of device.
    """
    return _available_on(torch.device(device)).bytes


def free_disk_bytes(path: Path | str) -> int:
    """Bytes that this user may still write on the device of ``path``, which need not exist yet."""
    place = Path(path).absolute()
    existing = next(p for p in (place, *place.parents) if os.path.exists(p))  # False too where it may not be looked at
    return shutil.disk_usage(existing).free


def resolve_budgets(budget: BudgetConfig, device: torch.device | str, store_path: Path | str | None) -> Budgets:
    """Turn ``[budget]`` into bytes; shares are of what is available now on device, host and disk.

    Not given: 75% each on a CUDA device, its host and the disk of a store. On the CPU both pools live in host
    memory: gpu 25% and host 50%, but at most a half (gpu) or two thirds (host) of what the other, if given,
    leaves.

    Raises
    ------
    BudgetError
        More is given than is available.
    ConfigError
        ``[budget] disk`` without ``[store] path``.
    UnsupportedError
        The device is neither a CUDA device nor the CPU.
    """
    device = torch.device(device)
    disk = _disk_budget(budget.disk, store_path)
    host = available_host()
    if device.type == "cpu":
        return Budgets(*_shared_budgets(budget, host), disk)
    gpu_bytes = _within("[budget] gpu", budget.gpu or Size(percent=75), _available_on(device))
    return Budgets(gpu_bytes, _within("[budget] host", budget.host or Size(percent=75), host), disk)


def _available_on(device: torch.device) -> Available:
    if device.type == "cpu":
        return available_host()
    if device.type == "cuda":
        return Available(torch.cuda.mem_get_info(device)[0], f"free memory of {device}")
    raise UnsupportedError(f'kvtier runs on "cuda" devices and on the "cpu", not on "{device}": move the model there')


def _disk_budget(disk: Size | None, store_path: Path | str | None) -> int | None:
    if store_path is None:
        if disk is not None:
            advice = "set [store] path to a directory, or leave [budget] disk out"
            raise ConfigError(f"[budget] disk = {disk} has no store to be spent on: {advice}")
        return None
    available = Available(free_disk_bytes(store_path), f"free on the disk of {store_path}")
    if not available.bytes:
        raise StoreError(f"[store] path = {store_path} is on a device without free space: choose another directory")
    return _within("[budget] disk", disk or Size(percent=75), available)


def _shared_budgets(budget: BudgetConfig, host: Available) -> tuple[int, int]:
    """Budgets of the device and the host pool where both are host memory."""
    gpu_bytes = _within("[budget] gpu", budget.gpu, host) if budget.gpu else None
    host_bytes = _within("[budget] host", budget.host, host) if budget.host else None
    if gpu_bytes is None:
        gpu_bytes = min(host.bytes // 4, (host.bytes - (host_bytes or 0)) // 2)
    if host_bytes is None:
        host_bytes = min(host.bytes // 2, (host.bytes - gpu_bytes) * 2 // 3)
    if gpu_bytes + host_bytes > host.bytes:
        wanted = f"gpu = {format_bytes(gpu_bytes)} + host = {format_bytes(host_bytes)}"
        fits = f"{format_bytes(host.bytes - gpu_bytes)} or gpu to {format_bytes(host.bytes - host_bytes)}"
        raise BudgetError(
            f"[budget] {wanted} = {format_bytes(gpu_bytes + host_bytes)}, but on the CPU both are "
            f"host memory, of which only {format_bytes(host.bytes)} is available ({host.limit}): lower host to "
            f"{fits}"
        )
    return gpu_bytes, host_bytes


def _within(key: str, size: Size, available: Available) -> int:
    wanted = size.resolve(available.bytes)
    if wanted > available.bytes:
        there = f"only {format_bytes(available.bytes)} is available ({available.limit})"
        share = f'"75%", which is {format_bytes(available.bytes * 3 // 4)} now'
        raise BudgetError(f"{key} = {format_bytes(wanted)}, but {there}: lower it or use a share such as {share}")
    return wanted


def _cgroup_limits(root: Path, proc_cgroup: Path) -> Iterator[Available]:
    """Yield what the process's own group and each of its parents allow, in cgroup v2 and v1."""
    try:
        lines = proc_cgroup.read_text().splitlines()
    except OSError:
        return  # no cgroups on this system
    for line in lines:
        hierarchy, controllers, group = line.split(":", 2)
        if hierarchy == "0":
            yield from _group_limits(root, group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _group_limits(root / "memory", group, *names)


def _group_limits(top: Path, group: str, limit_name: str, usage_name: str, cache_key: str) -> Iterator[Available]:
    """Yield what a group and its parents allow, leaving out those without a limit.

    In a container the list may name the host's group, which is not mounted: the root of the mount is the
    container's own group then.
    """
    parts = [part for part in group.split("/") if part]
    if ".." in parts:
        parts = []  # a group outside the namespace
    for depth in range(len(parts), -1, -1):
        folder = top.joinpath(*parts[:depth])
        limit, usage = _read_int(folder / limit_name), _read_int(folder / usage_name)
        if limit is not None and usage is not None:
            left = limit - usage + _inactive_file(folder / "memory.stat", cache_key)
            yield Available(min(max(left, 0), limit), f"cgroup {folder / limit_name}")


def _read_int(path: Path) -> int | None:
    """Return the number in a cgroup file; None for "max", and where there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _inactive_file(path: Path, key: str) -> int:
    try:
        rows = dict(line.split(" ", 1) for line in path.read_text().splitlines() if " " in line)
    except OSError:
        return 0
    value = rows.get(key, "0").strip()
    return int(value) if value.isdecimal() else 0
