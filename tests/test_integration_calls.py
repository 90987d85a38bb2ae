"""Any order of calls on single and batch caches, with tiny budgets and a disk: every row is what a fresh run gives."""

import functools
import gc
import tempfile

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from models import cache_of, minimum_budget
from rows import FEW, MAKERS, close, failing, forward, held, padded, stored, texts, window_bytes

import kvtier

REWIND = "rewind"
MOST_ROWS = 9
"""Of all caches: budgets are made for so many."""
LENGTHS = st.sampled_from([1, 1, 2, 5, 19, 30, 60, 110])


class Oracle:
    """A block with room for everything, in which each history of a row is run from its beginning in a new cache."""

    def __init__(self, model, kv):
        self.model, self.kv = model, kv
        self.logits = functools.cache(self._logits)

    def _logits(self, history):
        """Logits [V] after the last piece of a history, a tuple of pieces (tuples of tokens) and rewinds."""
        cache, logits = self.kv.new_cache(), None
        for piece in history:
            if piece == REWIND:
                cache.rewind()
            else:
                logits = self.model(torch.tensor([piece]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        return logits


def tokens_of(history):
    """What a row with this history holds."""
    tokens = []
    for piece in history:
        tokens = tokens[:-1] if piece == REWIND else [*tokens, *piece]
    return tokens


class Held:
    """A cache and the history of each of its rows."""

    def __init__(self, cache, histories):
        self.cache, self.histories = cache, list(histories)

    def can_rewind(self):
        return all(h and h[-1] != REWIND for h in self.histories)


class Calls(RuleBasedStateMachine):
    caches = Bundle("caches")
    model = config = oracle = None

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.kv = kvtier.offload(self.model, {**self.config, "store": {"path": f"{self.folder.name}/store"}})
        self.kv.__enter__()
        self.alive, self.seed = [], 0

    def teardown(self):
        for one in self.alive:
            one.cache = None
        gc.collect()
        tiers, seats = held(self.kv)
        self.kv.__exit__(None, None, None)
        self.folder.cleanup()
        assert {name: chunks for name, (_, chunks) in tiers.items()} == {"device": 0, "host": 0, "disk": 0}
        assert seats == 1

    # -- what the rules share --

    def draw(self, lengths):
        self.seed += 10
        return texts(*lengths, seed=1000 + self.seed)

    def keep(self, cache, histories):
        self.alive.append(Held(cache, histories))
        return self.alive[-1]

    def n_rows(self):
        return sum(h.cache.n_rows for h in self.alive)

    def check(self, held, logits):
        for history, scores in zip(held.histories, logits, strict=True):
            close(scores, self.oracle.logits(history), 1e-4)

    def append(self, held, rows):
        held.histories = [(*h, tuple(row.tolist())) for h, row in zip(held.histories, rows, strict=True)]

    # -- rules: each begins with what it needs, else does nothing --

    @rule(target=caches, lengths=st.lists(LENGTHS, min_size=1, max_size=3), extra=st.integers(0, 2))
    def prefill(self, lengths, extra):
        if self.n_rows() + len(lengths) > MOST_ROWS:
            return multiple()
        rows = self.draw(lengths)
        ids, mask = padded(rows, extra)
        held = self.keep(self.kv.prefill(ids, attention_mask=mask), [()] * len(rows))
        self.append(held, rows)
        return held

    @rule(target=caches, rows=st.integers(1, 3))
    def new_cache(self, rows):
        if self.n_rows() + rows > MOST_ROWS:
            return multiple()
        return self.keep(self.kv.new_cache(rows), [()] * rows)

    @rule(target=caches, held=caches, how=st.sampled_from(["fork", "row", "rows"]), index=st.integers(0, 2))
    def fork(self, held, how, index):
        index %= held.cache.n_rows
        fork = {
            "fork": lambda: (held.cache.fork(), held.histories),
            "row": lambda: (held.cache.row(index), [held.histories[index]]),
            "rows": lambda: (held.cache.row(index).fork(rows=2), [held.histories[index]] * 2),
        }[how]()
        return self.keep(*fork) if self.n_rows() + len(fork[1]) <= MOST_ROWS else multiple()

    @rule(held=caches, lengths=st.lists(LENGTHS, min_size=3, max_size=3), extra=st.integers(0, 1))
    def forward(self, held, lengths, extra):
        rows = self.draw(lengths[: held.cache.n_rows])
        logits = forward(self.model, rows, held.cache, extra)
        self.append(held, rows)
        self.check(held, [row[-1] for row in logits])

    @rule(held=caches, lengths=st.lists(LENGTHS, min_size=3, max_size=3), steps=st.integers(1, 4), ends=st.booleans())
    def generate(self, held, lengths, steps, ends):
        rows = self.draw(lengths[: held.cache.n_rows])
        self.run(held, rows, rows, steps, ends)

    @precondition(lambda self: any(h.can_rewind() for h in self.alive))
    @rule(held=caches, steps=st.integers(1, 3))
    def generate_from_exactly_what_is_cached(self, held, steps):
        if held.can_rewind() and all(len(tokens_of(h)) > 1 for h in held.histories):
            whole = [torch.tensor(tokens_of(h)) for h in held.histories]
            held.histories = [(*h, REWIND) for h in held.histories]
            self.run(held, whole, [row[-1:] for row in whole], steps, False)

    def run(self, held, given, new, steps, ends):
        """Generate on ``given`` ids, of which ``new`` are not cached; check the first and the last step's logits."""
        ids, mask = padded(given)
        options = {"do_sample": False, "max_new_tokens": steps, "return_dict_in_generate": True, "output_logits": True}
        options["eos_token_id"] = list(range(0, 1009, 3)) if ends else None
        out = self.model.generate(ids, attention_mask=mask, past_key_values=held.cache, **options)
        self.append(held, new)
        self.check(held, out.logits[0])
        answers = out.sequences[:, ids.shape[1] :].tolist()
        for row, answer in enumerate(answers):
            fed = next((i for i, token in enumerate(answer) if ends and token % 3 == 0), len(answer) - 1)
            held.histories[row] += tuple((token,) for token in answer[:fed])
            close(out.logits[fed][row], self.oracle.logits(held.histories[row]), 1e-4)

    @rule(target=caches, held=caches, length=LENGTHS)
    def several_sequences(self, held, length):
        if held.cache.n_rows > 1 or self.n_rows() + 2 > MOST_ROWS:
            return multiple()
        (new,) = self.draw([length])
        options = {"do_sample": True, "max_new_tokens": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
        out = self.model.generate(new[None], past_key_values=held.cache, **options)
        (history,) = held.histories
        if length > 1:
            history = (*history, tuple(new.tolist()), REWIND)
        held.histories = [history]
        answers = out.sequences[:, length:-1].tolist()
        histories = [(*history, (new[-1].item(),), *((token,) for token in answer)) for answer in answers]
        return self.keep(cache_of(out), histories)

    @rule(held=caches)
    def rewind(self, held):
        if held.can_rewind():
            held.cache.rewind()
            held.histories = [(*h, REWIND) for h in held.histories]

    @rule(held=consumes(caches))
    def delete(self, held):
        self.alive.remove(held)
        held.cache = None

    @rule(held=caches, case=st.sampled_from(["mask", "beams", "rows", "budget", "hook", "generate"]))
    def refused(self, held, case):
        n = held.cache.n_rows
        ids, cache = torch.stack(self.draw([4] * n)), held.cache
        if case == "hook":
            with failing(self.model, 1, layer=1), pytest.raises(RuntimeError, match="in the middle"):
                self.model(ids, past_key_values=cache)
        elif case == "generate":
            with failing(self.model, 1), pytest.raises(RuntimeError, match="in the middle"):
                self.model.generate(ids, past_key_values=cache, max_new_tokens=2)
        elif case == "budget":
            with pytest.raises(kvtier.BudgetError, match="of a batch of 40"):
                self.model(ids[:1].repeat(40, 1))
        else:
            arguments = {"mask": {"attention_mask": torch.eye(n, 4).flip(1) * 0}, "beams": {"num_beams": 2}, "rows": {}}
            ids = torch.cat((ids, ids[:1])) if case == "rows" else ids
            with pytest.raises(kvtier.UnsupportedError):
                self.model.generate(ids, past_key_values=cache, max_new_tokens=2, **arguments[case])

    @invariant()
    def rows_hold_their_tokens_and_budgets_are_kept(self):
        for one in self.alive:
            assert stored(one.cache) == [tokens_of(h) for h in one.histories]
        assert all(tier["bytes"] <= tier["budget"] for tier in self.kv.stats()["tiers"].values())


@pytest.mark.parametrize(("family", "examples"), [("llama", 25), ("gemma3", 10)])
def test_any_order_of_calls_gives_what_fresh_runs_give(family, examples):
    model, fresh = MAKERS[family](), MAKERS[family]()
    sizes = kvtier.offload(model, FEW)._runtime._sizes
    gpu = minimum_budget(model, FEW, "gpu") + 2 * (2 * window_bytes(model, FEW) + MOST_ROWS * sizes.summaries)
    budget = {"gpu": gpu, "host": minimum_budget(model, FEW, "host") + (24 << 10), "disk": "16MiB"}
    with kvtier.offload(fresh, FEW) as kv:
        bound = {"model": model, "config": {**FEW, "budget": budget}, "oracle": Oracle(fresh, kv)}
        hypothesis.stateful.run_state_machine_as_test(
            type("BoundCalls", (Calls,), bound),
            settings=hypothesis.settings(
                max_examples=examples, stateful_step_count=14, deadline=None, derandomize=True
            ),
        )
