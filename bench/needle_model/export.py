"""Writes what ships: bf16 weights, tokenizer, the record of the training, and the model's card (from card.md)."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

LIMIT_BYTES = 20_000_000

CARD = Path(__file__).with_name("card.md")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Weights, configuration and tokenizer, as ``from_pretrained`` reads them. ``model`` becomes bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    generation: Any = GenerationConfig
    model.generation_config = generation(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    if size > LIMIT_BYTES:
        raise ValueError(f"the weights have {size} bytes, at most {LIMIT_BYTES} ship")


def save_record(record: dict[str, Any], config: Any, folder: Path) -> None:
    """training.json and the card."""
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    sources = "\n".join(
        f"  - {s['work']}, {s['characters']:,} characters, from {s['taken_from']}, SHA-256 `{s['sha256'][:16]}...`"
        for s in record["sources"]
    )
    rates, machine = record["in_window"], record["machine"]
    card = CARD.read_text().format(
        parameters=record["parameters"],
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        theta=record["rope_theta"],
        window=config.max_position_embeddings,
        found=rates["found"],
        tries=rates["tries"],
        rate=rates["rate"],
        eval_seed=record["evaluation_seed"],
        minutes=record["training_seconds"] / 60,
        machine=machine["gpu"] or machine["cpu"],
        tokens=record["tokens"],
        seed=record["seed"],
        command="` then `".join([*record["resumed_from"], record["command"]]),
        sources=sources,
    )
    (folder / "README.md").write_text(card)
