"""The command ``kvtier``: text for people, ``--json`` for programs; exit 0 ok, 1 failed, 2 wrong use."""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvtier.cli_parser import make_parser
from kvtier.completion import script
from kvtier.runtime.errors import KvtierError

if TYPE_CHECKING:
    from kvtier.config import Config
    from kvtier.offload import Offload
    from kvtier.run import Reader
    from kvtier.sessions import Session


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        code = COMMANDS[vars(arguments)["command"]](arguments)
    except KvtierError as error:
        print(f"kvtier: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kvtier: interrupted", file=sys.stderr)
        return 130
    return code


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
            answers.append({"question": question} | _answer(arguments, kv, reader, question, streamer))
        stats = kv.stats()
    if arguments.json:
        report = {"tokens": len(reader.ids), "answers": answers, "stats": stats}
        print(json.dumps(report if session is None else report | {"session": session.report()}))
    else:
        print(f"\n{stats}", file=sys.stderr)
    return 0


def _answer(
    arguments: argparse.Namespace, kv: "Offload", reader: "Reader", question: str, streamer: Any
) -> dict[str, Any]:
    """The answer to one question and, with ``--explain``, where it was drawn from, printed unless with ``--json``."""
    if not arguments.explain:
        return {"answer": reader.ask(question, streamer)}
    with kv.tracing():
        answer = reader.ask(question, streamer)
    explanation = kv.explain(tokenizer=reader.tokenizer)
    if not arguments.json:
        print(f"\n{explanation}\n", flush=True)
    return {"answer": answer, "explanation": explanation.to_dict()}


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
    print(script(make_parser(), arguments.shell), end="")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from kvtier.plan import plan, table

    report = plan(
        arguments.model,
        arguments.tokens,
        arguments.config,
        device=arguments.device,
        gpu=arguments.gpu,
        host=arguments.host,
        disk=arguments.disk,
        weights=arguments.weights,
        rows=arguments.rows,
        forks=arguments.forks,
        miss=arguments.miss,
        card=arguments.card,
        measured=arguments.measure,
        say=_say,
    )
    print(json.dumps(report) if arguments.json else table(report))
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from kvtier.verify_store import table, verify_store

    report = verify_store(arguments.store, _say if sys.stderr.isatty() else lambda line: None)
    print(json.dumps(report) if arguments.json else table(report))
    return 0 if report["ok"] else 1


def _export(arguments: argparse.Namespace) -> int:
    from kvtier.remote import export_sequence

    report = export_sequence(arguments.store, arguments.url, arguments.id, say=_say, force=arguments.force)
    print(json.dumps(report) if arguments.json else f"{report['id']} is at {report['url']}")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    from kvtier.remote import restore_sequence

    report = restore_sequence(arguments.url, arguments.store, arguments.id, say=_say)
    print(json.dumps(report) if arguments.json else f"{report['id']} is in {report['store']}")
    return 0


COMMANDS = {
    "demo": _demo,
    "run": _run,
    "plan": _plan,
    "inspect": _inspect,
    "verify": _verify,
    "export": _export,
    "restore": _restore,
    "completion": _completion,
}
