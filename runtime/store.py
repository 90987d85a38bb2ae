"""The disk tier: chunks that host memory cannot hold, as records of a zarr v3 array.

``<path>`` is a zarr group. Every open tier has a scratch group ``spill-<pid>-<random>`` with one array,
``kv``: ``kv[i]`` is one record, a chunk ``[2, C, D]`` as bytes and padding; the attributes of the scratch group
say how to read it. zarr makes the metadata; records go through ``runtime.shards``. Which chunk is in which
record is known only to the process that wrote it, so scratch is worthless to others: it goes at ``close``, or at
the next open after a crash.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kvtier.runtime.budget import Budget
from kvtier.runtime.errors import StoreError
from kvtier.runtime.shards import BLOCK_BYTES, ShardFiles, ShardLayout
from kvtier.runtime.slot_tier import TRANSIENT_BYTES, SlotTier, as_bytes
from kvtier.runtime.tier import Ids
from kvtier.runtime.zarr_arrays import METADATA, create_metadata, group_metadata

VERSION = 1
"""Of the on-disk layout."""

EMPTY_STORE_BYTES = 10 * BLOCK_BYTES
"""A store without chunks: four folders, three zarr.json, one more while it is replaced, two spare blocks."""


class StoreTier(SlotTier):
    """Chunks on disk.

    Parameters
    ----------
    path
        Folder of the store; created if its parent exists. Several tiers, of several processes, can share it.
    budget
        ``[budget] disk``. Bytes are taken shard by shard, metadata included: the device never gives more.
    chunk, head_dim, dtype, bits
        Of a chunk ``[2, C, D]``: tokens, elements, type; bits a number of its record, None: kept as it is.

    Raises
    ------
    StoreError
        The path cannot be used, the device is full or fails, or zarr is not installed.
    BudgetError
        The budget holds not even the metadata.
    """

    name = "disk"

    def __init__(
        self,
        path: str | Path,
        budget: Budget,
        chunk: int,
        head_dim: int,
        dtype: torch.dtype,
        bits: int | None = None,
    ) -> None:
        super().__init__(budget, chunk, head_dim, dtype, bits)
        self._described = {
            "version": VERSION,
            "dtype": str(dtype).removeprefix("torch."),
            "bits": bits,
            "chunk": chunk,
            "head_dim": head_dim,
            "order": "K then V, [2, C, D]" if bits is None else "kvtier.kernels.quantize",
            "payload_bytes": self._payload_bytes,
        }
        zarr = _import_zarr()
        self._layout = ShardLayout.fit(self._payload_bytes, max(0, budget.free_bytes - EMPTY_STORE_BYTES))
        self._take(EMPTY_STORE_BYTES, f"an empty store at {path}")
        try:
            with _usable(Path(path)) as root:
                _open_root(root)
                _remove_stale_scratch(root)
                self.scratch, self._lock_fd = self._make_scratch(zarr, root)
        except BaseException:
            self._give(EMPTY_STORE_BYTES)
            raise
        self._metadata_path = self.scratch / "kv" / "zarr.json"
        self._metadata: dict[str, Any] = json.loads(self._metadata_path.read_text())
        self._shards = ShardFiles(self.scratch / "kv", self._layout)

    @property
    def chunk_bytes(self) -> int:
        return -(-self._layout.disk_bytes // self._layout.n_records)

    def room(self) -> int:
        if self._closed:
            return 0
        return self._map.n_free + self.budget.free_bytes // self._layout.disk_bytes * self._layout.n_records

    def _bytes_for(self, n: int) -> int:
        return -(-n // self._layout.n_records) * self._layout.disk_bytes

    def _make_room(self, n: int) -> None:
        while self._map.n_free < n:
            self._add_shard()

    def _add_shard(self) -> None:
        """One more shard and its slots. On failure nothing remains of it."""
        nbytes = self._layout.disk_bytes
        self._take(nbytes, f"a shard of {self._layout.n_records} chunks")
        try:
            self._shards.add()
            try:
                self._publish()
            except BaseException:
                self._shards.remove_last()
                raise
        except BaseException:
            self._give(nbytes)
            raise
        self._map.add_slots(self._layout.n_records)

    def _publish(self) -> None:
        """Let ``shape[0]`` of the array cover every shard; readers see the old or the new metadata, whole."""
        shape = [self._shards.n_shards * self._layout.n_records, self._layout.record_bytes]
        temporary = self._metadata_path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self._metadata | {"shape": shape}))
            temporary.replace(self._metadata_path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(
                f"{self._metadata_path} cannot be written: {error}. Nothing stored is damaged. "
                "Free space there, or choose another [store] path."
            ) from error

    def _write(self, slots: Ids, chunks: torch.Tensor) -> None:
        self._shards.write(slots, as_bytes(chunks.cpu().contiguous()))

    def _read(self, slots: Ids, out: torch.Tensor) -> None:
        if out.device.type == "cpu" and out.is_contiguous():
            self._shards.read(slots, as_bytes(out))
            return
        step = max(1, TRANSIENT_BYTES // self._payload_bytes)
        for begin in range(0, len(slots), step):
            part = slots[begin : begin + step]
            staging = torch.empty((len(part), *self._shape), dtype=self._dtype)
            self._shards.read(part, as_bytes(staging))
            out[begin : begin + step].copy_(staging)

    def _release_all(self) -> None:
        self._shards.close()
        shutil.rmtree(self.scratch, ignore_errors=True)
        os.close(self._lock_fd)

    def _make_scratch(self, zarr: ModuleType, root: Path) -> tuple[Path, int]:
        """A scratch group with an empty array, and the descriptor that holds its lock."""
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        # Under another name until it is locked: a process that opens the store now would take it for stale.
        # Whoever is killed between these lines leaves a few KiB.
        hidden, scratch = root / f"new-{name}", root / f"spill-{name}"
        try:
            group = zarr.create_group(hidden, zarr_format=3, attributes={"kvtier": self._described})
            record_bytes, n_records = self._layout.record_bytes, self._layout.n_records
            group.create_array(
                "kv",
                shape=(0, record_bytes),
                dtype="uint8",
                chunks=(1, record_bytes),
                shards={"shape": (n_records, record_bytes), "index_location": "end"},
                compressors=None,
                filters=None,
                fill_value=0,
            )
            lock_fd = _lock(hidden)
            assert lock_fd is not None, f"{hidden} is locked by somebody else"
            hidden.rename(scratch)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return scratch, lock_fd


def _import_zarr() -> ModuleType:
    """zarr, which only a configuration with a store needs."""
    try:
        import google_crc32c  # noqa: F401  (for the shard index; zarr depends on it)
        import zarr
    except ImportError as error:
        raise StoreError(
            f"[store] path is given, but the disk tier needs zarr 3, which cannot be imported ({error}): "
            "pip install zarr, or remove [store] path."
        ) from error
    return zarr


@contextmanager
def _usable(path: Path) -> Iterator[Path]:
    """The folder, created if need be; a StoreError with the reason for whatever goes wrong with it."""
    advice = "Choose another [store] path, or none to do without a disk tier."
    if not path.parent.is_dir():
        # not created: it is often a mount point whose device is missing
        raise StoreError(f"[store] path = {path}: there is no folder {path.parent}. Create it, or mount it. {advice}")
    try:
        path.mkdir(exist_ok=True)
        yield path.resolve()
    except FileExistsError as error:
        raise StoreError(f"[store] path = {path} is a file, expected a folder. {advice}") from error
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"[store] path = {path} cannot be used: {error}. {advice}") from error


def _open_root(root: Path) -> None:
    """Make ``root`` a zarr group of ours, or check that it is one."""
    metadata_path = root / METADATA
    if not metadata_path.exists():
        create_metadata(root, group_metadata({"kvtier": {"version": VERSION}}))
    try:
        version = json.loads(metadata_path.read_text())["attributes"]["kvtier"]["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"[store] path = {root} holds zarr data that kvtier did not write. Choose another folder; "
            "nothing was changed."
        ) from error
    if version != VERSION:
        raise StoreError(
            f"[store] path = {root} has layout version {version}, this kvtier reads {VERSION}. "
            "Use the kvtier that wrote it, or another folder; nothing was changed."
        )


def _lock(scratch: Path) -> int | None:
    """Lock a scratch group for as long as the returned descriptor is open, or None if its owner lives.

    The lock is on the group's own zarr.json, which is never replaced: zarr warns readers of a lock file.
    """
    fd = os.open(scratch / "zarr.json", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _remove_stale_scratch(root: Path) -> None:
    """Remove what killed processes left. The scratch of others that run, or of other users, is left alone."""
    for scratch in root.glob("spill-*"):
        try:
            lock_fd = _lock(scratch)
        except FileNotFoundError:  # half removed
            lock_fd = None
            shutil.rmtree(scratch, ignore_errors=True)
        except PermissionError:
            continue
        if lock_fd is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock_fd)
