"""Trains the needle model from scratch: ``python -m bench.needle_model.train --minutes 8.5 --out DIR``.

AdamW for embeddings and norms, Muon for the matrices, bf16 with float32 master weights. Sequences grow from 256 to
8,192 tokens as soon as the shorter ones are answered. ``--text DIR`` adds ``*.txt.gz`` to the novel of the repository.
``--device cpu --minutes 1 --tiny`` goes through all of it with a model that learns nothing.
"""

import argparse
import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from bench.needle_model import evaluate, export, texts
from bench.needle_model.data import Batch, BatchSource, Recipe
from bench.needle_model.model import ROPE_THETA, WINDOW, TrainingPass, make_config, make_model
from bench.needle_model.task import Encoder, Haystack
from bench.results import machine

STAGES = (
    ((256, 1.0),),
    ((1024, 0.8), (256, 0.2)),
    ((4096, 0.6), (1024, 0.3), (256, 0.1)),
    ((8192, 0.6), (4096, 0.2), (1024, 0.15), (256, 0.05)),
)
DEADLINES = (0.2, 0.3, 0.4)
"""Share of the time after which a stage ends even though its questions are not answered."""
ANSWERED = 0.95
LOG_STEPS = 25
WARMUP_STEPS = 100
STEADY = 0.35
"""Share of the time with the full learning rate; then it falls linearly."""
MATRIX_RATE, OTHER_RATE = 4e-3, 2e-3
KEY_NOISE = 0.25
"""From the last stage on, when retrieval works."""
EVALUATION_SEED = 20_260


@dataclass(slots=True)
class Point:
    """A point of the loss curve: means over the LOG_STEPS steps before it."""

    step: int
    seconds: float
    stage: int
    loss: float
    prose_loss: float
    answer_loss: float
    answered: float
    """Share of answers with every token right."""
    rate: float
    tokens_per_second: float


class Optimizers:
    """Muon and AdamW behind one step."""

    def __init__(self, model: Any) -> None:
        muon: Any = torch.optim.Muon
        matrices = [p for name, p in model.named_parameters() if "layers." in name and p.ndim == 2]
        known = set(map(id, matrices))
        others = [p for p in model.parameters() if id(p) not in known]
        fused = model.device.type == "cuda"
        self.muon = muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        self.adam = torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        self._parameters = [*matrices, *others]

    def step(self, share_of_rate: float) -> None:
        for optimizer, rate in ((self.muon, MATRIX_RATE), (self.adam, OTHER_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate * share_of_rate
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for each in (self.muon, self.adam):
            each.step()
            each.zero_grad(set_to_none=True)


class Trainer:
    def __init__(self, model: Any, source: BatchSource, minutes: float, rate: float = 1.0) -> None:
        self.model, self.source = model, source
        self.optimizers = Optimizers(model)
        self.seconds_before, self.tokens = 0.0, 0
        self.curve: list[Point] = []
        self.commands_before: list[str] = []
        self._pass = TrainingPass(model, compiled=model.device.type == "cuda")
        self._seconds, self._rate = minutes * 60, rate
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Of this run."""
        return time.perf_counter() - self._begun

    def run(self) -> None:
        self._begun = logged = time.perf_counter()
        window: list[tuple[torch.Tensor, ...]] = []
        batches: list[Batch] = []
        for step in itertools.count(1):
            progress = self.seconds / self._seconds
            if progress >= 1:
                break
            batch = self.source.next()
            window.append(self._step(batch, step, progress))
            batches.append(batch)
            if step % LOG_STEPS == 0:
                self._log(step, window, batches, time.perf_counter() - logged, progress)
                window, batches, logged = [], [], time.perf_counter()
                self._next_stage(progress)
        if batches:
            self._log(step, window, batches, time.perf_counter() - logged, 1.0)

    def _step(self, batch: Batch, step: int, progress: float) -> tuple[torch.Tensor, ...]:
        self._pass.key_noise = KEY_NOISE if self.source.stage == len(DEADLINES) else 0.0
        arrays = (batch.ids, batch.positions, batch.index, batch.targets, batch.weights)
        on_device = [self._to_device(array) for array in arrays]
        loss, each, right = self._pass(batch.length, *on_device)
        loss.backward()
        self.optimizers.step(self._rate * _share_of_rate(step, progress))
        self.tokens += len(batch.ids)
        return loss.detach(), each, right

    def _to_device(self, array: Any) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.model.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.model.device, non_blocking=True)

    def _log(self, step: int, window: Any, batches: list[Batch], seconds: float, progress: float) -> None:
        losses = torch.stack([loss for loss, _, _ in window]).cpu().numpy()
        each = torch.stack([each for _, each, _ in window]).cpu().numpy()
        right = torch.stack([right for _, _, right in window]).cpu().numpy()
        answer = np.stack([batch.answer for batch in batches])
        prose = (answer < 0) & (np.stack([batch.weights for batch in batches]) > 0)
        exact = np.concatenate([_exact(a, r) for a, r in zip(answer, right, strict=True)])
        point = Point(
            step=step,
            seconds=round(self.seconds_before + self.seconds, 1),
            stage=self.source.stage,
            loss=_rounded(losses.mean()),
            prose_loss=_rounded(each[prose].mean()),
            answer_loss=_rounded(each[answer >= 0].mean()),
            answered=_rounded(exact.mean()),
            rate=_rounded(self._rate * _share_of_rate(step, progress)),
            tokens_per_second=round(sum(len(batch.ids) for batch in batches) / seconds),
        )
        self.curve.append(point)
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"the loss is not finite at step {step}")
        print(" ".join(f"{name} {value}" for name, value in asdict(point).items()), flush=True)

    def _next_stage(self, progress: float) -> None:
        stage = self.source.stage
        if stage < len(DEADLINES) and (self.curve[-1].answered > ANSWERED or progress > DEADLINES[stage]):
            self.source.advance()

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "muon": self.optimizers.muon.state_dict(),
            "adam": self.optimizers.adam.state_dict(),
            "seconds": self.seconds_before + self.seconds,
            "tokens": self.tokens,
            "stage": self.source.stage,
            "commands": [*self.commands_before, _command()],
            "curve": [asdict(point) for point in self.curve],
        }
        torch.save(state, path)

    def load(self, folder: Path) -> None:
        """Goes on where a run ended: its weights, moments, stage and curve; the schedule starts afresh."""
        path = folder / "checkpoint.pt"
        if not path.exists():
            return self._load_shipped(folder / "weights")
        state = torch.load(path, map_location=self.model.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizers.muon.load_state_dict(state["muon"])
        self.optimizers.adam.load_state_dict(state["adam"])
        self.seconds_before, self.tokens = state["seconds"], state["tokens"]
        self.commands_before = state["commands"]
        self.curve = [Point(**point) for point in state["curve"]]
        while self.source.stage < state["stage"]:
            self.source.advance()

    def _load_shipped(self, folder: Path) -> None:
        """From the bf16 weights that a run left, with fresh moments, in the last stage."""
        shipped = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.load_state_dict(shipped.state_dict())
        record = json.loads((folder / "training.json").read_text())
        self.seconds_before, self.tokens = record["training_seconds"], record["tokens"]
        self.commands_before = [*record["resumed_from"], record["command"]]
        self.curve = [Point(**point) for point in record["curve"]]
        while self.source.stage < len(DEADLINES):
            self.source.advance()


def _share_of_rate(step: int, progress: float) -> float:
    return min(1.0, step / WARMUP_STEPS) * min(1.0, max(0.02, (1 - progress) / (1 - STEADY)))


def _exact(answer: Any, right: Any) -> Any:
    """Per answer of one batch: are all its tokens right? Answers come first, each in one piece."""
    n = int((answer >= 0).sum())
    starts = np.flatnonzero(np.diff(answer[:n], prepend=-1))
    return np.minimum.reduceat(right[:n], starts) if n else np.zeros(0, bool)


def _rounded(value: Any) -> float:
    return round(float(value), 4)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.needle_model.train", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.5, help="of training; evaluation comes on top")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint and, in weights/, the model")
    parser.add_argument(
        "--resume", type=Path, help="folder of a run to go on with: its checkpoint, or else its weights"
    )
    parser.add_argument("--rate", type=float, default=1.0, help="share of the learning rates; 0.3 to go on")
    parser.add_argument("--text", type=Path, help="folder with more *.txt.gz")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short sequences")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, help="processes that make batches (default: all cores but two)")
    parser.add_argument("--tries", type=int, default=500, help="of the in-window evaluation")
    return parser.parse_args(arguments)


def make_recipe(tiny: bool) -> tuple[Recipe, int]:
    """How sequences are made, and the size of the vocabulary."""
    if tiny:
        return Recipe(2048, WINDOW, (((256, 1.0),), ((512, 1.0),), ((512, 1.0),), ((512, 1.0),))), 1024
    return Recipe(65_536, WINDOW, STAGES), 4096


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    recipe, vocab_size = make_recipe(args.tiny)
    sources = texts.read_texts(args.text)
    inner = texts.train_tokenizer(sources, vocab_size, args.seed)
    if args.resume:
        inner = Tokenizer.from_file(str(args.resume / "weights" / "tokenizer.json"))
    plain = texts.PlainTokenizer(inner)
    encoder = Encoder(plain, texts.BOS_ID, texts.EOS_ID)
    haystack = Haystack.of_text(encoder, plain, "\n\n".join(each.text for each in sources))
    n_workers = (os.cpu_count() or 3) - 2 if args.workers is None else args.workers
    config = make_config(len(plain), texts.BOS_ID, texts.EOS_ID, texts.PAD_ID, args.tiny)
    source = BatchSource(encoder, haystack, recipe, args.seed, n_workers)  # forks: before CUDA is in use
    model = make_model(config, args.seed).to(args.device)
    trainer = Trainer(model, source, args.minutes, args.rate)
    if args.resume:
        trainer.load(args.resume)
    try:
        trainer.run()
    finally:
        source.close()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer.save(args.out / "checkpoint.pt")
    weights = args.out / "weights"
    export.save(model, texts.for_transformers(inner, WINDOW), weights)
    lengths = (512, 1024) if args.tiny else evaluate.LENGTHS
    made = evaluate.make_tries(encoder, haystack, args.tries, EVALUATION_SEED, lengths)
    rates = evaluate.summary(made, evaluate.found(model.eval(), made))
    export.save_record(_record(args, trainer, sources, rates), config, weights)
    print({name: value for name, value in rates.items() if name != "missed"}, *rates["missed"][:5], sep="\n")


def _command() -> str:
    return " ".join(["python", "-m", "bench.needle_model.train", *sys.argv[1:]])


def _record(args: argparse.Namespace, trainer: Trainer, sources: list[texts.Text], rates: Any) -> dict[str, Any]:
    return {
        "command": _command(),
        "resumed_from": trainer.commands_before,
        "seed": args.seed,
        "machine": machine(),
        "training_seconds": round(trainer.seconds_before + trainer.seconds, 1),
        "tokens": trainer.tokens,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "rope_theta": ROPE_THETA,
        "sources": [each.record for each in sources],
        "evaluation_seed": EVALUATION_SEED,
        "in_window": rates,
        "curve": [asdict(point) for point in trainer.curve],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
