"""Metadata of zarr v3 arrays and groups as JSON, and files whose bytes are an array's values as they are.

Nothing here needs zarr: what is written is what zarr-python writes (tests/test_zarr_arrays.py), and any reader of zarr
v3 opens it. A *piece* is what zarr calls a chunk of the grid: the values of one file, named ``c.<i>.<j>...``.
"""

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

METADATA = "zarr.json"
PARTIAL = ".partial"
"""How the name of a file ends that is about to be renamed."""
Json = dict[str, Any]


def dtype_name(dtype: torch.dtype) -> str:
    """As numpy and zarr call it, but for bfloat16."""
    return str(dtype).removeprefix("torch.")


def stored_type(dtype: torch.dtype) -> str:
    """The type of the values on disk: bfloat16 is stored as its bits, uint16."""
    return "uint16" if dtype == torch.bfloat16 else dtype_name(dtype)


def group_metadata(attributes: Json) -> Json:
    """Of a group."""
    return {"attributes": attributes, "zarr_format": 3, "node_type": "group"}


def array_metadata(
    shape: Sequence[int],
    dtype: torch.dtype,
    piece: Sequence[int],
    inner: Sequence[int] | None = None,
    attributes: Json | None = None,
) -> Json:
    """Of an array in files of ``piece`` values; with ``inner`` each file is a shard of such chunks, the index last."""
    stored = stored_type(dtype)
    plain = (
        {"name": "bytes"} if stored in ("uint8", "int8") else {"name": "bytes", "configuration": {"endian": "little"}}
    )
    codec: Json = plain
    if inner is not None:
        index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
        sharding = {"chunk_shape": list(inner), "codecs": [plain], "index_codecs": index, "index_location": "end"}
        codec = {"name": "sharding_indexed", "configuration": sharding}
    return {
        "shape": list(shape),
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [max(1, n) for n in piece]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if stored.startswith("float") else 0,
        "codecs": [codec],
        "attributes": {"dtype": dtype_name(dtype)} | (attributes or {}),
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def piece_path(folder: Path, *index: int) -> Path:
    """The file of one piece."""
    return folder / ".".join(("c", *map(str, index)))


def write_metadata(folder: Path, metadata: Json, *, sync: bool = True) -> None:
    """Make ``folder`` a zarr node; readers see the old or the new metadata, whole. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{METADATA}{PARTIAL}"
    try:
        with temporary.open("w") as file:
            json.dump(metadata, file, indent=2)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        temporary.replace(folder / METADATA)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(folder)


def create_metadata(folder: Path, metadata: Json) -> None:
    """Make ``folder`` a zarr node unless it is one; of several processes one makes it, all of it at once.

    Unlike ``write_metadata`` it never replaces the file, which somebody may have locked. Raises OSError.
    """
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{METADATA}.{os.getpid()}-{threading.get_ident()}{PARTIAL}"
    try:
        with temporary.open("w") as file:
            json.dump(metadata, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        # whoever was quicker may have removed the temporary file as one that was left behind
        with suppress(FileExistsError, FileNotFoundError):
            os.link(temporary, folder / METADATA)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Put a folder's own entries on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def raw(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """The values as they are stored: a contiguous array on the host."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def tensor_of(values: npt.NDArray[Any], dtype: torch.dtype) -> torch.Tensor:
    """The reverse of ``raw``."""
    return torch.from_numpy(values).view(dtype)


def write_whole(folder: Path, tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Write an array in one file, on the disk when this returns; gives the values back. Raises OSError."""
    values = raw(tensor)
    write_metadata(folder, array_metadata(values.shape, tensor.dtype, values.shape))
    if not values.size:
        return values
    fd = os.open(piece_path(folder, *(0 for _ in values.shape)), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        write_at(fd, values.reshape(-1).view(np.uint8), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_folder(folder)
    return values


def read_whole(folder: Path, shape: Sequence[int], dtype: torch.dtype) -> npt.NDArray[Any]:
    """The values of an array in one file. Raises OSError; EOFError when there are fewer than ``shape`` says."""
    values = np.empty(shape, stored_type(dtype))
    if not values.size:
        return values
    with open(piece_path(folder, *(0 for _ in shape)), "rb") as file:
        if file.readinto(values.reshape(-1).view(np.uint8).data) != values.nbytes:
            raise EOFError(f"{file.name} holds less than {values.nbytes} bytes")
    return values


def write_at(fd: int, data: npt.NDArray[np.uint8], offset: int) -> None:
    """All of ``data`` [n] at a byte offset of a file. Raises OSError."""
    view = data.data
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
