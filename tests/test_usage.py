"""docs/usage.md: every Python block runs, in order, on a tiny model; its tables and commands are what the code says."""

import contextlib
import io
import math
import random
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from models import assert_untouched, fingerprint, tiny_llama
from test_families import FAMILIES as MODELS
from test_families import HYBRIDS, model_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvtier import cli, families, generate
from kvtier.forward import REFUSED as REFUSED_ARGUMENTS
from kvtier.kernels.quantize import record_bytes
from kvtier.runtime.summary import make_summary

PAGE = Path(__file__).resolve().parent.parent / "docs" / "usage.md"
BOOK = " ".join(random.Random(0).choices([f"w{i}" for i in range(80)], k=380))
"""380 words, one token each: with the questions just so long that all of it is attended, as transformers does."""


@dataclass(frozen=True)
class Block:
    heading: str
    language: str
    line: int
    code: str


def blocks_of(page):
    """The fenced blocks of a Markdown page."""
    heading, fence, blocks = "", None, []
    for number, line in enumerate(page.splitlines(), 1):
        if fence is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("```"):
            if fence is not None:
                blocks.append(Block(heading, *fence))
            fence = (line[3:].strip(), number, "") if fence is None else None
        elif fence is not None:
            fence = (*fence[:2], f"{fence[2]}{line}\n")
    assert fence is None, "a block is not closed"
    return blocks


BLOCKS = blocks_of(PAGE.read_text(encoding="utf-8"))


def tokenizer_of_words():
    """One token a word; words it does not know are ``<unk>``."""
    words = ["<pad>", "<unk>", "</s>", "Who", "is", "Emma?", "Where", "do", "they", *(f"w{i}" for i in range(80))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **names)


@dataclass
class Run:
    """What the page's blocks left behind: their names, and what the blocks under each heading printed."""

    names: dict
    printed: dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The whole page, run once in a folder of its own."""
    folder = tmp_path_factory.mktemp("usage")
    (folder / "book.txt").write_text(BOOK)
    for block in BLOCKS:
        if block.language == "toml":
            (folder / block.code.splitlines()[0].lstrip("# ")).write_text(block.code)
    names, printed = {"__name__": "usage"}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer_of_words())
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: tiny_llama())
        before = None
        for block in BLOCKS:
            if block.language == "python":
                torch.manual_seed(0)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * block.line + block.code, PAGE, "exec"), names)
                printed[block.heading] = printed.get(block.heading, "") + out.getvalue()
                before = before or fingerprint(names["model"])
                assert_untouched(names["model"], before)
    return Run(names, printed)


def stock(run, *texts, n=16):
    """The words that transformers alone adds to the texts, greedily."""
    ids = torch.cat([text if isinstance(text, torch.Tensor) else run.names["ids_of"](text) for text in texts], dim=1)
    out = tiny_llama().generate(ids, max_new_tokens=n, do_sample=False)
    return run.names["tokenizer"].decode(out[0, ids.shape[1] :])


def check_generate(run, printed):
    assert printed == stock(run, BOOK) + "\n"


def check_questions(run, printed):
    assert printed == "380 tokens read once, 3 answers\n"
    assert run.names["answers"] == [stock(run, BOOK, question) for question in run.names["questions"]]
    assert len(set(run.names["answers"])) > 1


def check_turns(run, printed):
    first, second, _ = run.names["questions"]
    answer = run.names["ids_of"](stock(run, BOOK, first))
    assert run.names["turn"][0, 0] == answer[0, -1]
    assert run.names["second_answer"] == stock(run, BOOK, first, answer, second)
    assert printed == f"TieredCache({380 + 3 + 16 + 4 + 15} tokens)\n"


def check_batch(run, printed):
    assert printed == "TieredCache(398, 399, 399 tokens) TieredCache(398 tokens)\n"
    assert run.names["in_a_batch"] == run.names["answers"], "a row of a batch is not what it is alone"


def check_samples(run, printed):
    assert len(run.names["samples"]) == 4
    assert len(set(run.names["samples"])) > 1
    assert {sample[:12] for sample in run.names["samples"]} == {"Who is Emma?"}


def check_stream(run, printed):
    assert printed.strip() == run.names["answers"][0]


def check_pipeline(run, printed):
    assert printed.strip() == stock(run, BOOK)


def check_call(run, printed):
    assert printed.strip() == stock(run, BOOK, n=8)


def check_budgets(run, printed):
    assert "local=128" in printed
    assert "select=8" in printed
    assert '[budget]\ngpu = "25%"\n\n[attention]\nselect = 8\n' in printed
    assert "[budget] gpu = 1.00 KiB is below the minimum working set" in printed


def check_disk(run, printed):
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert {"device", "host", "disk"} <= rows.keys()
    assert not list(Path(run.names["config"]["store"]["path"]).glob("spill-*"))


def check_stats(run, printed):
    assert re.match(
        r"380 tokens read, \d+ of 536870912 bytes of host memory in use\nat most 380 tokens attended", printed
    )


def check_explain(run, printed):
    why, ids = run.names["why"], run.names["ids_of"](BOOK)[0]
    assert why.blocks[0][0] == len(ids) == 380
    assert printed.startswith(f"{why}\ntokens {why.spans[0].begin} to {why.spans[0].end}, most in layer ")
    for span in why.spans:
        assert span.text == run.names["tokenizer"].decode(ids[span.begin : span.end])


def check_audit(run, printed):
    audit = run.names["audit"]
    assert printed.startswith(f"{audit}\nrecall {audit.recall:.2f}, worst layer ")
    assert len(audit.blocks) == 8
    assert (audit.n_chosen, audit.n_chunks) == (4, 9)
    assert 0.5 < audit.recall < 1


def check_methods(run, printed):
    words = [run.names["tokenizer"].decode(run.names[name][0, 3:]) for name in ("out", "without")]
    assert [len(answer.split()) for answer in words] == [16, 16]
    assert len({*words, run.names["answers"][0]}) == 3, "neither attends to all of the text"


def check_sessions(run, printed):
    assert printed == "0 tokens read again\n"
    assert run.names["book"].n_rows == 1
    assert re.fullmatch(r"[0-9a-f]{8,}", run.names["saved"])


def check_durable(run, printed):
    assert printed == "380 tokens were there, 0 read\n"
    assert run.names["book"].n_rows == 1


def check_smaller(run, printed):
    heads = run.names["model"].config
    assert printed == f"{record_bytes(32, heads.head_dim, 4)} bytes a chunk\n"


CHECKS = {
    "Recipes": lambda run, printed: None,
    "Generate from a long prompt": check_generate,
    "Read a book once, ask many questions": check_questions,
    "Several turns": check_turns,
    "Many questions in one batch": check_batch,
    "Several sampled answers to one question": check_samples,
    "Stream an answer": check_stream,
    "Use a pipeline": check_pipeline,
    "Call the model yourself": check_call,
    "Set budgets": check_budgets,
    "Use a disk": check_disk,
    "See what happened": check_stats,
    "See which passages an answer was drawn from": check_explain,
    "Check the choice of chunks on your own text": check_audit,
    "Compare with the paper's method, or with sinks and window alone": check_methods,
    "Keep what was read": check_sessions,
    "Read a long text so that it can be interrupted": check_durable,
    "Keep chunks smaller": check_smaller,
}


@pytest.mark.parametrize("heading", CHECKS)
def test_the_recipe_does_what_it_says(run, heading):
    CHECKS[heading](run, run.printed[heading])


def test_every_recipe_is_checked():
    assert [*dict.fromkeys(block.heading for block in BLOCKS if block.language == "python")] == [*CHECKS]
    assert {block.language for block in BLOCKS} == {"python", "toml", "console"}


def test_a_block_that_fails_fails_at_its_line_of_the_page():
    block = next(b for b in blocks_of("# Title\n\ntext\n```python\n1 / 0\n```\n"))
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("\n" * block.line + block.code, PAGE, "exec"), {})
    assert caught.traceback[-1].lineno + 1 == 5


def test_commands_on_the_page_are_commands():
    lines = [line for block in BLOCKS if block.language == "console" for line in block.code.splitlines()]
    assert lines
    for line in lines:
        prompt, program, *arguments = shlex.split(line)
        assert (prompt, program) == ("$", "kvtier"), line
        assert cli.make_parser().parse_args(arguments).command in cli.COMMANDS


# -- tables ------------------------------------------------------------------------------------------------------------


def rows_under(first_cell):
    """The rows of the table on the page whose head begins with ``first_cell``, as lists of cells."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_cell} |")) + 2
    end = next((i for i in range(begin, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[begin:end]]


def family_of(name):
    modules = (families._class_name(module) for module in model_of(name).modules())
    return next(families.FAMILIES[full].name for full in modules if full in families.FAMILIES)


def test_the_table_lists_exactly_the_supported_families():
    assert [row[0] for row in rows_under("family")] == [family.name for family in families.FAMILIES.values()]


def test_the_table_says_which_families_have_sliding_layers():
    said = {name: sliding for name, sliding, _ in rows_under("family")}
    some = {family_of(name) for name in HYBRIDS}
    alike = {family.name for family in families.FAMILIES.values() if family.window_in_config}
    assert {name for name, sliding in said.items() if sliding == "some"} == some
    assert {name for name, sliding in said.items() if sliding == "all or none"} == alike
    assert set(said.values()) == {"some", "all or none", "-"}
    assert len(MODELS) > len(said)


def test_the_table_has_every_reason_to_refuse_a_class():
    assert {row[1] for row in rows_under("refused")} >= set(families.REFUSED.values())
    named = " ".join(row[0] for row in rows_under("refused")).lower().replace(" ", "").replace("-", "")
    for full in families.REFUSED:
        model = full.split(".")[2].replace("_", "").replace("v2", "").replace("v3", "")
        assert model in named, f"{full} is not in the table"


def test_the_table_has_every_argument_that_is_refused():
    text = " ".join(row[0] for row in rows_under("what"))
    tables = generate.ONE | generate.UNSET | generate.UNSET_ARGUMENTS | REFUSED_ARGUMENTS
    assert [name for name in tables if f"`{name}" not in text] == []


def test_the_memory_arithmetic_is_right():
    """SmolLM2-135M: 30 layers, 3 KV heads, head_dim 64, two bytes a number."""
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    per_token = 2 * 30 * 3 * 64 * 2
    assert f"{per_token / 1024} KiB for SmolLM2-135M in bfloat16" in text
    assert f"{per_token * 4 * 2**20 / 2**30:.0f} GiB for 4M tokens" in text
    summary = make_summary("sketch", chunk=32, head_dim=64, dtype=torch.bfloat16, rank=16, bits=4)
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in summary.layout().values())
    assert f"{nbytes // 32} bytes with the defaults" in text
    assert nbytes % 32 == 0
