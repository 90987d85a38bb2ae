"""Writes ``bench/results/<bench>.json``: figures with the machine, versions and command that gave them."""

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"


def record(bench: str, rows: list[dict[str, Any]], command: str) -> Path:
    """Merge ``rows`` ({"case", "value", "unit", and optionally "ceiling", "baseline", ...}) into a bench's file.

    A case that was measured before on the same device is replaced, other cases stay.
    """
    path = FOLDER / f"{bench}.json"
    known = json.loads(path.read_text()) if path.exists() else []
    where = machine() | {"command": command}
    measured = {row["case"] for row in rows}
    kept = [row for row in known if row["case"] not in measured or row["gpu"] != where["gpu"]]
    kept += [{"ceiling": None, "baseline": None} | row | where for row in rows]
    FOLDER.mkdir(exist_ok=True)
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def machine() -> dict[str, str | None]:
    """What a figure must be stated with."""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": f"{_cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=FOLDER.parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def command_line() -> str:
    """The command that is running, as one could type it."""
    return " ".join(["python", "-m", "pytest", *sys.argv[1:]])
