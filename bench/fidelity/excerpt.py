"""``python -m bench.fidelity.excerpt CAPTURE FILE``: a piece of a capture, small enough for the repository.

One KV head of each of a few layers, side by side as if they were the heads of one layer: keys [N, T, D] as far as a
step can select, per step the choosing queries [N, group*Q, D] (un-rotated, scaled), and the q_outer [N, D, D] that a
summary is fitted with. The geometry, the steps and where all came from are in the file's metadata.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.fidelity.capture import CONTEXT, Step
from bench.fidelity.problem import LayerCapture, Problem, Question, default_geometry, measured_steps, read_meta
from kvtier.kernels.select import chunk_weights, exact_scores, top_chunks
from kvtier.runtime.geometry import Geometry


class Excerpt:
    """What a ``Problem`` has, from a file: keys, what a summary is fitted to, questions and their exact answers."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            said = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        self.geometry = Geometry(**json.loads(said["geometry"]))
        self.heads: list[tuple[int, int]] = [(layer, head) for layer, head in json.loads(said["heads"])]
        """(layer, KV head) of each."""
        fit_end = int(said["fit_end"])
        self.fit_keys = tensors["keys"][:, self.geometry.sink : fit_end].float()
        self.q_outer = tensors["q_outer"]
        self.keys = tensors["keys"][:, self.geometry.sink :].float().unflatten(1, (-1, self.geometry.chunk))
        self.questions = [
            self._question(Step(**step), tensors[f"q.{step['name']}"].float()) for step in json.loads(said["steps"])
        ]

    def _question(self, step: Step, rows: torch.Tensor) -> Question:
        n_chunks = self.geometry.selectable(step.start)
        weights = chunk_weights(exact_scores(rows, self.keys[:, :n_chunks]))
        return Question(step, n_chunks, rows, weights, top_chunks(weights, self.geometry.select))


def cut(folder: Path, layers: list[int], decode: int, asks: int, path: Path) -> None:
    """Write an excerpt of a capture: of ``layers``, KV head i % n_kv of the i-th; its blocks and ``asks`` questions."""
    meta = read_meta(folder)
    g = default_geometry(meta.geometry["max"], block=meta.geometry["block"])
    steps = [s for s in measured_steps(meta, g, decode) if s.ask < asks and (s.ask != CONTEXT or s.phase == "prefill")]
    n_chunks = max(g.selectable(step.start) for step in steps)
    heads = [(layer, i % meta.kv_heads) for i, layer in enumerate(layers)]
    parts: dict[str, list[torch.Tensor]] = {}
    fit_end = next(start for start in meta.block_starts if g.selectable(start) >= 1)
    for layer, head in heads:
        capture = LayerCapture(folder, meta, layer, "cpu")
        problem = Problem(capture, g, steps)
        found = {"keys": capture.keys[head, : g.sink + n_chunks * g.chunk], "q_outer": problem.q_outer[head]}
        found |= {f"q.{question.step.name}": question.rows[head].to(torch.bfloat16) for question in problem.questions}
        for name, tensor in found.items():
            parts.setdefault(name, []).append(tensor)
    said = {
        "source": f"{meta.model}, {meta.tokens} tokens of {meta.text}, computed in {meta.dtype}",
        "geometry": json.dumps(asdict(g)),
        "heads": json.dumps(heads),
        "fit_end": str(fit_end),
        "steps": json.dumps([asdict(step) for step in steps]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.stack(tensors).contiguous() for name, tensors in parts.items()}, path, metadata=said)


if __name__ == "__main__":
    p = argparse.ArgumentParser(prog="python -m bench.fidelity.excerpt", description=__doc__)
    p.add_argument("capture", type=Path)
    p.add_argument("file", type=Path)
    p.add_argument("--layers", nargs="+", type=int, default=[3, 11, 19, 27])
    p.add_argument("--decode", type=int, default=8, help="decode steps per question")
    p.add_argument("--asks", type=int, default=2, help="questions kept")
    args = p.parse_args()
    cut(args.capture, args.layers, args.decode, args.asks, args.file)
