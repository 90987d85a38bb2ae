"""The command ``kvtier``: text for people, ``--json`` for programs; exit 0 ok, 1 failed, 2 wrong use."""

import argparse
import json
import random
import sys
from collections.abc import Sequence

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
    return parser


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


def _demo(arguments: argparse.Namespace) -> int:
    from transformers.utils import logging

    from kvtier.demo import run_demo

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    out = sys.stderr if arguments.json else sys.stdout
    report = run_demo(
        arguments.tokens, seed, arguments.store, arguments.device, lambda line: print(line, file=out, flush=True)
    )
    if arguments.json:
        print(json.dumps(report))
    return 0
