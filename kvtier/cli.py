"""The command ``kvtier``: text for people, ``--json`` for programs; exit 0 ok, 1 failed, 2 wrong use."""

import argparse
import json
import random
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import kvtier
from kvtier.completion import SHELLS, Parser, script
from kvtier.runtime.errors import KvtierError

if TYPE_CHECKING:
    from kvtier.config import Config
    from kvtier.sessions import Session


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


def _parser() -> Parser:
    parser = Parser(
        prog="kvtier",
        description="Long contexts for stock Hugging Face models, with the KV cache on GPU, host and disk.",
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvtier {kvtier.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_demo, _add_run, _add_inspect, _add_completion):
        command = add(commands)
        parser.commands[command.name] = command
    return parser


EXAMPLES = {
    "": """\
start here:
  kvtier demo                                      see it work, with a small model (about 2 minutes)
  kvtier run MODEL --context book.txt              ask your own questions about a text
  kvtier run --help                                what can be set, and more examples

exit codes: 0 ok, 1 failed, 2 wrong use; failures are one line on stderr
""",
    "demo": """\
example:
  kvtier demo --tokens 8K --seed 1
""",
    "run": """\
examples:
  kvtier run Qwen/Qwen3-0.6B --context book.txt --question "Who is Emma?"
  kvtier run Qwen/Qwen3-0.6B --context book.txt --session ~/books    reads the book, asks you for questions
  kvtier run Qwen/Qwen3-0.6B --session ~/books --question "And Mr Knightley?"    opens it, in seconds
""",
    "inspect": """\
example:
  kvtier inspect ~/books

To remove a sequence, delete its folder: STORE/sequences/ID.
""",
    "completion": """\
examples:
  eval "$(kvtier completion bash)"                                      in ~/.bashrc
  eval "$(kvtier completion zsh)"                                       in ~/.zshrc, after compinit
  kvtier completion fish > ~/.config/fish/completions/kvtier.fish
""",
}
"""What follows the help of each command."""


def _add(commands: Any, name: str, help: str, description: str) -> Parser:
    """A command whose help ends with an example."""
    command: Parser = commands.add_parser(
        name,
        help=help,
        summary=help,
        description=textwrap.fill(description, 100),
        epilog=EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def _add_demo(commands: Any) -> Parser:
    demo = _add(
        commands,
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
    return demo


def _add_run(commands: Any) -> Parser:
    run = _add(
        commands,
        "run",
        help="read text files once and answer questions about them",
        description="Reads the context once, then answers each question from it. Without --question it asks for them. "
        "With --session what was read is kept in a folder, and the next run with the same model, context and settings "
        "opens it instead of reading again.",
    )
    run.add_argument("model", metavar="MODEL", help="a hub name, a folder or a .gguf file")
    run.add_argument(
        "--context",
        nargs="+",
        metavar="FILE",
        help="text files (UTF-8), read one after the other; - is stdin. Needed unless --session has what was read",
    )
    run.add_argument(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be given several times; each is asked of the context alone, not of the answers before",
    )
    run.add_argument(
        "--session",
        metavar="STORE",
        help="a folder in which contexts that were read are kept; made if need be. Without --context the one that it "
        "holds is opened",
    )
    run.add_argument("--id", metavar="ID", help="which one, where STORE holds several: see kvtier inspect STORE")
    run.add_argument("--config", metavar="FILE", help="a kvtier TOML file; default: budgets from free memory")
    run.add_argument("--max-new-tokens", type=_tokens, default=256, metavar="N", help="length of an answer (256)")
    run.add_argument("--device", default=None, help='"cuda" or "cpu"; default: cuda if there is one')
    run.add_argument("--dtype", default="auto", help='of the weights: "auto" (as stored), "bfloat16", "float32", ...')
    run.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    run.set_defaults(run=_run)
    return run


def _add_inspect(commands: Any) -> Parser:
    inspect = _add(
        commands,
        "inspect",
        help="list the contexts that a session folder holds",
        description="Lists what cache.save(path) and kvtier run --session have saved in a folder: id, tokens, bytes on "
        "disk, the model it belongs to and when it was saved. Loads no model.",
    )
    inspect.add_argument("store", metavar="STORE", help="the folder")
    inspect.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    inspect.set_defaults(run=_inspect)
    return inspect


def _add_completion(commands: Any) -> Parser:
    completion = _add(
        commands,
        "completion",
        help="print a script that lets your shell complete kvtier's commands",
        description="Prints a script for your shell that completes commands, options and files when you press Tab.",
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    completion.set_defaults(run=_completion)
    return completion


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
    if wrong := _wrong_use(arguments):
        print(f"kvtier: {wrong}", file=sys.stderr)
        return 2
    import torch
    from transformers import TextStreamer

    from kvtier.config import Config
    from kvtier.run import load, questions, read_context, reading

    _quieten_loading()
    config = Config.load(arguments.config)
    context = None if arguments.context is None else read_context(arguments.context)
    session = _session(arguments, config)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, model = load(arguments.model, device, arguments.dtype)
    answers = []
    with reading(tokenizer, model, config, context, arguments.max_new_tokens, session) as (kv, reader):
        for question in questions(arguments.question, _say):
            streamer = None
            if not arguments.json:
                streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                print(f"{question}\n", flush=True)
            answers.append({"question": question, "answer": reader.ask(question, streamer)})
        stats = kv.stats()
    if arguments.json:
        report = {"tokens": len(reader.ids), "answers": answers, "stats": stats}
        print(json.dumps(report if session is None else report | {"session": session.report()}))
    else:
        print(f"\n{stats}", file=sys.stderr)
    return 0


def _wrong_use(arguments: argparse.Namespace) -> str | None:
    """What is wrong with the arguments of ``kvtier run``, beyond what the parser sees."""
    if arguments.context is None and arguments.session is None:
        return "give --context FILE (what to read), or --session STORE (what was read before), or both"
    if arguments.id is not None and (arguments.session is None or arguments.context is not None):
        return "--id says what to open with --session STORE and without --context"
    if not arguments.question and (arguments.json or "-" in (arguments.context or ())):
        return "give --question with --json, or when the context comes from stdin"
    return None


def _session(arguments: argparse.Namespace, config: "Config") -> "Session | None":
    """What ``--session`` asks for, checked as far as it can be before the model is loaded."""
    if arguments.session is None:
        return None
    from kvtier.sessions import Session, check_method

    check_method(config.attention.method)
    session = Session(arguments.session, arguments.id, _say)
    session.check(must_exist=arguments.context is None)
    return session


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _inspect(arguments: argparse.Namespace) -> int:
    from kvtier.inspect_store import describe_store, table

    report = describe_store(arguments.store)
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    print(script(_parser(), arguments.shell), end="")
    return 0
