"""The needle task and the model trained for it: what is planted is there, one answer fits, misses count."""

import json
import random
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from bench.needle_model import evaluate, texts, train
from bench.needle_model.data import ANSWER, Recipe, make_batch, make_sequence
from bench.needle_model.model import TrainingPass, make_config, make_model
from bench.needle_model.task import (
    ANSWER_TOKENS,
    KEY_KINDS,
    VALUE_KINDS,
    Encoder,
    Haystack,
    NeedleMaker,
    answer_ids,
    build_context,
    even_depths,
    score,
)

WEIGHTS = Path(__file__).parents[1] / "bench" / "needle_model" / "weights"
NEEDS_WEIGHTS = pytest.mark.skipif(not WEIGHTS.exists(), reason="the needle model has not been trained here")
EMMA = texts.read_texts(None)[0]
PLAIN = texts.PlainTokenizer(texts.train_tokenizer([texts.Text("emma", EMMA.text[:100_000])], 1024, seed=1))
ENCODER = Encoder(PLAIN, texts.BOS_ID, texts.EOS_ID)
HAYSTACK = Haystack.of_text(ENCODER, PLAIN, EMMA.text[:200_000])


def decode(ids):
    return PLAIN.inner.decode([int(i) for i in ids], skip_special_tokens=False)


def needles(n, seed=0, near=0.5):
    return NeedleMaker(random.Random(seed), near).draw(n)


@given(st.text() | st.from_regex(r"[A-Z]{0,3}[a-z]{0,3}-?[0-9]{0,3}[ \n.]{0,3}é?"))
def test_the_encoder_gives_what_the_tokenizer_gives(text):
    assert ENCODER.encode(text) == PLAIN(text, add_special_tokens=False)["input_ids"]


def test_keys_and_values_have_the_same_tokens_wherever_they_stand():
    for needle in needles(300):
        sentence, question = ENCODER.encode(needle.sentence), ENCODER.encode(needle.question)
        assert decode(sentence) == needle.sentence
        value = answer_ids(ENCODER, needle)[:-1]
        assert len(value) < ANSWER_TOKENS
        key = ENCODER.encode(f" {needle.key}")
        assert sentence[-len(value) - 1 : -1] == value
        assert all(any(ids[i : i + len(key)] == key for i in range(len(ids))) for ids in (sentence, question))


def test_keys_are_distinct_and_of_every_kind():
    made = needles(400, near=0.9)
    assert len({needle.key for needle in made}) == len(made)
    assert {needle.key_kind for needle in made} == set(KEY_KINDS)
    assert {needle.value_kind for needle in made} == set(VALUE_KINDS)


@pytest.mark.parametrize("kind", ["pair", "person", "code", "case"])
def test_a_rival_differs_in_one_place_only(kind):
    maker = NeedleMaker(random.Random(2), near=0.0)
    needle = maker.draw(1, [kind])[0]
    rival = maker.rival(needle)
    assert (rival.sentence_form, rival.value_kind) == (needle.sentence_form, needle.value_kind)
    if kind in ("pair", "person"):
        assert len(set(rival.key.split()) & set(needle.key.split())) == 1
    else:
        assert 1 <= sum(a != b for a, b in zip(rival.key, needle.key, strict=True)) <= 2


def test_a_context_follows_from_its_seed():
    first, again, other = (build_context(ENCODER, HAYSTACK, 4000, even_depths(5), 20, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.ids, again.ids)
    assert first.needles == again.needles
    assert not np.array_equal(first.ids, other.ids)


@pytest.mark.parametrize(("n_tokens", "n_distractors"), [(3000, 0), (16_384, 200), (300_000, 200)])
def test_needles_lie_where_they_were_asked_for(n_tokens, n_distractors):
    depths = [0.9, 0.0, 0.5, 0.25]
    context = build_context(ENCODER, HAYSTACK, n_tokens, depths, n_distractors, seed=5)
    assert len(context.ids) == n_tokens
    assert context.ids[0] == texts.BOS_ID
    text = decode(context.ids)
    for needle, (begin, end), depth in zip(context.needles, context.spans, depths, strict=True):
        assert decode(context.ids[begin:end]) == needle.sentence
        assert -1 <= begin - depth * n_tokens < 500  # after the sentence there, and distractors at the same place
        assert text.count(needle.sentence) == 1
    assert all(distractor.sentence in text for distractor in context.distractors)
    keys = [needle.key for needle in (*context.needles, *context.distractors)]
    assert len(set(keys)) == 4 + n_distractors


def test_a_context_too_short_for_its_needles_is_refused():
    with pytest.raises(ValueError, match="the context only 200"):
        build_context(ENCODER, HAYSTACK, 200, even_depths(50), 0, seed=1)


def test_the_haystack_has_no_end():
    ids = HAYSTACK.take(3 * len(HAYSTACK.ids), random.Random(1))
    assert len(ids) == 3 * len(HAYSTACK.ids)
    counts = np.bincount(ids, minlength=len(PLAIN)) / np.bincount(HAYSTACK.ids, minlength=len(PLAIN)).clip(1)
    common = np.bincount(HAYSTACK.ids, minlength=len(PLAIN)) > 200
    assert np.abs(counts[common] - 3).max() < 1  # every part comes about as often


def test_only_the_value_scores():
    needle = next(each for each in needles(50) if each.value_kind == "number")
    value = needle.value
    assert score(f" {value}", needle)
    assert score(f"{value}.\nQuestion: and so on", needle)
    wrong = ["", "\n", value[:-1], value + "0", value[::-1], f"the number is {value}", f"{value} or another"]
    assert not any(score(answer, needle) for answer in wrong)


def test_training_sequences_end_with_questions_that_the_context_answers():
    for seed in range(30):
        ids, kinds, positions = make_sequence(ENCODER, HAYSTACK, 1024, 8192, random.Random(seed))
        assert len(ids) == len(kinds) == len(positions) == 1024
        assert len(set(positions.tolist())) == 1024
        assert positions.min() == 0
        assert positions.max() < 8192
        context = decode(ids[: int(np.flatnonzero(kinds == ANSWER)[0])])
        answers = decode(ids[kinds == ANSWER]).split(texts.EOS)[:-1]
        assert answers
        assert all(f"{answer}." in context for answer in answers)


def test_the_loss_counts_answers_and_little_else():
    recipe = Recipe(2048, 8192, (((512, 1.0),),))
    batch = make_batch(ENCODER, HAYSTACK, recipe, 0, random.Random(1))
    n = int((batch.answer >= 0).sum())
    assert batch.weights[:n].sum() == pytest.approx(1)
    assert batch.weights[n:].sum() < 0.5
    assert np.array_equal(batch.targets[:n], batch.ids[batch.index[:n] + 1])
    assert decode(batch.targets[:n]).count(texts.EOS) == batch.answer.max() + 1


def test_the_pass_for_training_is_the_model_of_transformers():
    model = make_model(make_config(len(PLAIN), texts.BOS_ID, texts.EOS_ID, texts.PAD_ID, tiny=True), seed=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = make_batch(ENCODER, HAYSTACK, Recipe(1024, 8192, (((256, 1.0),),)), 0, random.Random(3))
    ids, positions, *rest = map(
        torch.from_numpy, (batch.ids, batch.positions, batch.index, batch.targets, batch.weights)
    )
    loss, each, _ = TrainingPass(model, compiled=False)(256, ids, positions, *rest)
    rows = [row.view(4, 256) for row in (ids, positions)]
    mask = torch.ones(4, 256, dtype=torch.long)  # given, so that gaps in positions are not taken for packed sequences
    with torch.no_grad():
        logits = model(input_ids=rows[0], position_ids=rows[1], attention_mask=mask).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits[rest[0]], rest[1], reduction="none")
    torch.testing.assert_close(each, expected, atol=1e-4, rtol=1e-4)
    assert loss.item() == pytest.approx(float((expected * rest[2]).sum()), rel=1e-4)


def test_a_short_training_leaves_a_model_that_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    common = ["--device", "cpu", "--tiny", "--workers", "0", "--tries", "4"]
    train.main([*common, "--minutes", "0.02", "--out", str(tmp_path / "one")])
    train.main([*common, "--minutes", "0.02", "--out", str(tmp_path / "two"), "--resume", str(tmp_path / "one")])
    folder = tmp_path / "two" / "weights"
    record = json.loads((folder / "training.json").read_text())
    assert record["in_window"]["tries"] == 4
    assert record["curve"]
    assert "Emma" in (folder / "README.md").read_text()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert tokenizer("Emma.")["input_ids"][0] == model.config.bos_token_id
    assert tokenizer.decode(tokenizer("Emma -- 27.")["input_ids"], skip_special_tokens=True) == "Emma -- 27."


@pytest.fixture(scope="module")
def needlemodel():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    encoder = Encoder(tokenizer, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return tokenizer, model, encoder, Haystack.of_text(encoder, tokenizer, EMMA.text)


@NEEDS_WEIGHTS
def test_the_shipped_model_was_good_enough():
    rates = json.loads((WEIGHTS / "training.json").read_text())["in_window"]
    assert rates["tries"] >= 500
    assert rates["rate"] >= 0.99
    assert (WEIGHTS / "model.safetensors").stat().st_size <= 20_000_000


@NEEDS_WEIGHTS
def test_the_shipped_model_retrieves_in_its_window(needlemodel):
    tokenizer, model, encoder, haystack = needlemodel
    made = evaluate.make_tries(encoder, haystack, 8, seed=11, lengths=(512, 640))
    hits = evaluate.found(model, made)
    assert sum(hits) >= 7
    for each, hit in zip(made[:2], hits[:2], strict=True):
        prompt = torch.tensor([each.ids[: -each.n_answer]])
        out = model.generate(prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        assert score(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True), each.needle) == hit


@NEEDS_WEIGHTS
@pytest.mark.slow
def test_the_shipped_model_retrieves_at_64k_through_kvtier(needlemodel):
    import kvtier

    tokenizer, model, encoder, haystack = needlemodel
    context = build_context(encoder, haystack, 65_536, even_depths(11), 200, seed=7)
    with kvtier.offload(model, {"attention": {"max": 2048}}) as kv:
        book = kv.prefill(context.ids.tolist())
        found = 0
        for needle in context.needles:
            ids = torch.tensor([encoder.encode(needle.question)])
            out = model.generate(ids, past_key_values=book.fork(), max_new_tokens=ANSWER_TOKENS, do_sample=False)
            found += score(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), needle)
    assert found >= 10
