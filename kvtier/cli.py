"""The command ``kvtier``: text for people, ``--json`` for programs; exit 0 ok, 1 failed, 2 wrong use."""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import Any

import kvtier
from kvtier.runtime.errors import KvtierError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except KvtierError as error:
        print(f"kvtier: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kvtier: interrupted", file=sys.stderr)
        return 130
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kvtier",
        description="Long contexts for stock Hugging Face models, with the KV cache on GPU, host and disk.",
    )
    parser.add_argument("--version", action="version", version=f"kvtier {kvtier.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_run(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="a small model answers questions about a long text, on three tiers",
        description="SmolLM2-135M reads a novel with three planted facts under budgets so small that device, host "
        "and disk are all in use, and is asked for each fact with and without the tiers. About 2 minutes on two "
        "idle CPU cores at 16K.",
    )
    demo.add_argument(
        "--tokens", type=_tokens, default=16_384, metavar="N", help="length of the prompt, 4K to 128K (16K)"
    )
    demo.add_argument("--seed", type=int, help="of the facts; default: fresh facts at each run")
    demo.add_argument("--store", metavar="DIR", help="where the disk tier goes; default: a temporary directory")
    demo.add_argument("--device", default="cpu", help='"cpu" (the default) or "cuda"')
    demo.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    demo.set_defaults(run=_demo)


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="read text files once and answer questions about them",
        description="Reads the context once, then answers each question from it. Without --question it asks for them.",
    )
    run.add_argument("model", metavar="MODEL", help="a hub name, a folder or a .gguf file")
    run.add_argument("--context", nargs="+", required=True, metavar="FILE", help="text files (UTF-8); - is stdin")
    run.add_argument("--question", action="append", default=[], metavar="TEXT", help="may be given several times")
    run.add_argument("--config", metavar="FILE", help="a kvtier TOML file; default: budgets from free memory")
    run.add_argument("--max-new-tokens", type=_tokens, default=256, metavar="N", help="length of an answer (256)")
    run.add_argument("--device", default=None, help='"cuda" or "cpu"; default: cuda if there is one')
    run.add_argument("--dtype", default="auto", help='of the weights: "auto" (as stored), "bfloat16", "float32", ...')
    run.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    run.set_defaults(run=_run)


def _tokens(text: str) -> int:
    """``"16K"``, ``"1M"`` or ``"16384"`` (K = 1,024)."""
    units = {"K": 1024, "M": 1024**2}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1)
    try:
        tokens = int(number) * unit
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 16K or 16384") from None
    if tokens < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of tokens")
    return tokens


def _quieten_loading() -> None:
    """No progress bars of transformers where nobody watches them."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _demo(arguments: argparse.Namespace) -> int:
    from kvtier.demo import run_demo

    _quieten_loading()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    out = sys.stderr if arguments.json else sys.stdout
    report = run_demo(
        arguments.tokens, seed, arguments.store, arguments.device, lambda line: print(line, file=out, flush=True)
    )
    if arguments.json:
        print(json.dumps(report))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    if not arguments.question and (arguments.json or "-" in arguments.context):
        print("kvtier: give --question with --json, or when the context comes from stdin", file=sys.stderr)
        return 2
    import torch
    from transformers import TextStreamer

    from kvtier.config import Config
    from kvtier.run import load, questions, read_context, reading

    _quieten_loading()
    config = Config.load(arguments.config)
    context = read_context(arguments.context)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = load(arguments.model, device, arguments.dtype)
    answers = []
    with reading(tokenizer, model, config, context, arguments.max_new_tokens) as (kv, reader):
        for question in questions(arguments.question, lambda line: print(line, file=sys.stderr)):
            streamer = None
            if not arguments.json:
                streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                print(f"{question}\n", flush=True)
            answers.append({"question": question, "answer": reader.ask(question, streamer)})
        stats = kv.stats()
    if arguments.json:
        print(json.dumps({"tokens": len(reader.ids), "answers": answers, "stats": stats}))
    else:
        print(f"\n{stats}", file=sys.stderr)
    return 0
