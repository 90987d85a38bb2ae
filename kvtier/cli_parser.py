"""The arguments of the command ``kvtier`` and what its help says."""

import argparse
import textwrap
from typing import Any

import kvtier
from kvtier.completion import SHELLS, Parser


def make_parser() -> Parser:
    """The parser; ``arguments.command`` is the name of the command."""
    parser = Parser(
        prog="kvtier",
        description="Long contexts for stock Hugging Face models, with the KV cache on GPU, host and disk.",
        epilog=EXAMPLES[""],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"kvtier {kvtier.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_add_demo, _add_run, _add_plan, _add_inspect, _add_verify, _add_export, _add_restore, _add_completion):
        command = add(commands)
        if command.name != "completion":
            command.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
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
    "plan": """\
examples:
  kvtier plan Qwen/Qwen3-4B --tokens 4M --config kvtier.toml
  kvtier plan ./my-model --tokens 1M --gpu 24GiB --host 96GiB --disk 500GiB    for another machine
""",
    "verify": """\
example:
  kvtier verify ~/books

Exit code 1 if anything that was saved is damaged.
""",
    "export": """\
examples:
  kvtier export ~/books s3://bucket/books
  kvtier export ~/books s3://bucket/books --id 0123456789ab

Needs fsspec and the driver of the URL: pip install s3fs (s3://), gcsfs (gs://), adlfs (az://).
""",
    "restore": """\
example:
  kvtier restore s3://bucket/books ~/books
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
        "--tokens", type=tokens_of, default=16_384, metavar="N", help="length of the prompt, 4K to 128K (16K)"
    )
    demo.add_argument("--seed", type=int, help="of the facts; default: fresh facts at each run")
    demo.add_argument("--store", metavar="DIR", help="where the disk tier goes; default: a temporary directory")
    demo.add_argument("--device", default="cpu", help='"cpu" (the default) or "cuda"')
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
    run.add_argument("--explain", action="store_true", help="say after each answer which passages it was drawn from")
    run.add_argument("--config", metavar="FILE", help="a kvtier TOML file; default: budgets from free memory")
    run.add_argument("--max-new-tokens", type=tokens_of, default=256, metavar="N", help="length of an answer (256)")
    run.add_argument("--device", default=None, help='"cuda" or "cpu"; default: cuda if there is one')
    run.add_argument("--dtype", default="auto", help='of the weights: "auto" (as stored), "bfloat16", "float32", ...')
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
    return inspect


def _add_plan(commands: Any) -> Parser:
    plan = _add(
        commands,
        "plan",
        help="say whether a context fits, where it goes and how fast it can be",
        description="Computes the bytes that a context takes on GPU, host and disk, what does not fit and what to "
        "change, and how fast reading and answering can be at best. Reads the model's config alone.",
    )
    plan.add_argument("model", metavar="MODEL", help="a hub name, a folder, a .gguf file or a config.json")
    plan.add_argument("--tokens", type=tokens_of, required=True, metavar="N", help="length of the context, such as 1M")
    plan.add_argument("--config", metavar="FILE", help="a kvtier TOML file; default: budgets from free memory")
    plan.add_argument("--device", default=None, help='"cuda" or "cpu"; default: cuda if there is one')
    for tier in ("gpu", "host", "disk"):
        plan.add_argument(f"--{tier}", metavar="SIZE", help=f"[budget] {tier} in place of the configuration's")
    plan.add_argument("--rows", type=int, default=1, metavar="N", help="sequences of a batch, each so long (1)")
    plan.add_argument("--forks", type=int, default=0, metavar="N", help="forks held beside them (0)")
    plan.add_argument("--weights", default="auto", help='of the weights: "auto" (as stored), "bf16", "int8", "int4"')
    plan.add_argument(
        "--miss", type=float, default=0.5, metavar="SHARE", help="of chosen chunks that the GPU does not hold (0.5)"
    )
    plan.add_argument("--card", metavar="NAME", help="assume this card's bandwidths; default: the one that is here")
    plan.add_argument("--measure", action="store_true", help="measure this machine's bandwidths first (30 s)")
    return plan


def _add_verify(commands: Any) -> Parser:
    verify = _add(
        commands,
        "verify",
        help="check every record of a session folder",
        description="Reads everything that was saved in a folder, compares it with its checksums and names what is "
        "damaged. Loads no model, changes nothing.",
    )
    verify.add_argument("store", metavar="STORE", help="the folder")
    return verify


def _add_export(commands: Any) -> Parser:
    export = _add(
        commands,
        "export",
        help="copy a saved context to object storage",
        description="Copies what was saved in a folder to a URL that fsspec serves. It can be read there by any zarr "
        "reader, and brought back with kvtier restore.",
    )
    export.add_argument("store", metavar="STORE", help="the folder")
    export.add_argument("url", metavar="URL", help="where to, such as s3://bucket/books")
    export.add_argument("--id", metavar="ID", help="which one, where STORE holds several: see kvtier inspect STORE")
    export.add_argument("--force", action="store_true", help="send files again that are there already")
    return export


def _add_restore(commands: Any) -> Parser:
    restore = _add(
        commands,
        "restore",
        help="bring a saved context back from object storage",
        description="Copies what kvtier export has written to a URL into a folder and checks it.",
    )
    restore.add_argument("url", metavar="URL", help="where from, such as s3://bucket/books")
    restore.add_argument("store", metavar="STORE", help="the folder; made if need be")
    restore.add_argument("--id", metavar="ID", help="which one, where the URL holds several")
    return restore


def _add_completion(commands: Any) -> Parser:
    completion = _add(
        commands,
        "completion",
        help="print a script that lets your shell complete kvtier's commands",
        description="Prints a script for your shell that completes commands, options and files when you press Tab.",
    )
    completion.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")
    return completion


def tokens_of(text: str) -> int:
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
