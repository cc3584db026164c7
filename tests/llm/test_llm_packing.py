"""Sharing work between hypotheses: tries and shared prompts score like one-by-one runs, with fewer tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny_llm import ARCHITECTURES, make_tiny_llm

from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.llm import output_layer
from nemo_llm_feedback.llm.engine import Engine
from nemo_llm_feedback.llm.packing import PackedBatch, PackedRow, Sharing, batch_rows, plan_rows

VOCABULARY = 300


def load(folder: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def score(engine: Engine, requests):
    """The sums in the requests' order."""
    found = engine.score(dict(requests))
    return [[found[prompt][ids] for ids in texts] for prompt, texts in requests]


def random_ids(rng: random.Random, length: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, VOCABULARY) for _ in range(length))


def random_requests(seed: int, *, prompts: int = 3, continuations: int = 6):
    """Prompts of different lengths with continuations that share prefixes, one being a prefix of another."""
    rng = random.Random(seed)
    requests = []
    for _ in range(prompts):
        stem = random_ids(rng, 6)
        texts = {(*stem[: rng.randrange(7)], *random_ids(rng, rng.randrange(5)), 1) for _ in range(continuations)}
        requests.append((random_ids(rng, rng.randrange(1, 12)), sorted({*texts, (1,), (*stem, 1), (*stem[:3], 1)})))
    return requests


def unique_nodes(continuations) -> int:
    return len({ids[: depth + 1] for ids in continuations for depth in range(len(ids) - 1)})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(make_tiny_llm(tmp_path_factory.mktemp("llm")))


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "mamba"])
@pytest.mark.parametrize("sharing", [Sharing.TRIE, Sharing.PROMPT, Sharing.NONE])
def test_every_way_of_sharing_gives_the_plain_scores(architecture, sharing, tmp_path):
    model = load(make_tiny_llm(tmp_path, architecture=architecture))
    engine = Engine(model, token_budget=64)
    assert engine.sharing is Sharing.TRIE
    engine.sharing = sharing
    requests = random_requests(1)
    got = score(engine, requests)
    for (prompt, continuations), row in zip(requests, got, strict=True):
        assert row == pytest.approx([engine.plain_score(prompt, ids) for ids in continuations], abs=1e-4)


def test_short_windows_run_as_sequences_and_long_ones_as_tries(tmp_path):
    engine = Engine(load(make_tiny_llm(tmp_path, architecture="mistral")), token_budget=4096)  # a window of 8
    long, short = (tuple(range(3, 13)), [(5, 6, 1), (5, 7, 1)]), ((3, 4), [(5, 6, 1), (5, 7, 1)])
    for (prompt, continuations), nodes in ((long, 4), (short, 3)):
        before = engine.tokens_run
        score(engine, [(prompt, continuations)])
        assert engine.tokens_run - before == len(prompt) + nodes


def test_recurrent_models_and_unknown_output_layers_run_whole_rows(tmp_path, monkeypatch):
    assert Engine(load(make_tiny_llm(tmp_path / "m", architecture="mamba")), token_budget=64).sharing is Sharing.NONE
    model = load(make_tiny_llm(tmp_path / "l"))
    forward = model.forward

    def odd(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits.square()
        return out

    monkeypatch.setattr(model, "forward", odd)
    engine = Engine(model, token_budget=64)
    assert engine.sharing is Sharing.NONE
    requests = random_requests(2)
    expected = [[engine.plain_score(prompt, ids) for ids in texts] for prompt, texts in requests]
    assert score(engine, requests) == [pytest.approx(row, abs=1e-4) for row in expected]


def test_no_more_tokens_run_than_unique_ones_and_five_percent(llama):
    requests = random_requests(3, prompts=20, continuations=8)
    prompts = [tuple(ids) for ids in (range(3, 63) for _ in requests)]
    utterances = [
        ((n + 3, *prompt), texts) for n, (prompt, (_, texts)) in enumerate(zip(prompts, requests, strict=True))
    ]
    unique = sum(len(prompt) + unique_nodes(texts) for prompt, texts in utterances)
    engine = Engine(llama, token_budget=8192)
    score(engine, utterances)
    assert unique <= engine.tokens_run <= 1.05 * unique + 64
    # Behind one prompt the utterances' texts are one trie, cut into rows of a few hundred nodes.
    together = (prompts[0], sorted({ids for _, texts in requests for ids in texts}))
    engine = Engine(llama, token_budget=8192)
    score(engine, [together])
    unique = len(prompts[0]) + unique_nodes(together[1])
    assert unique <= engine.tokens_run <= 1.1 * unique


def test_prompts_run_once_for_the_whole_run(llama):
    engine = Engine(llama, token_budget=4096)
    (request,) = random_requests(4, prompts=1)
    first = score(engine, [request])
    before = engine.tokens_run
    assert score(engine, [request])[0] == pytest.approx(first[0], abs=1e-5)
    assert engine.tokens_run - before == unique_nodes(request[1])


def test_an_old_prompt_makes_room_for_a_new_one(llama, monkeypatch):
    engine = Engine(llama, token_budget=64)
    old, new = (3, 4, 5), (6, 7, 8)
    score(engine, [(old, [(9, 1)])])
    run = engine._hidden

    def fails_beside_the_old_one(cache, **inputs):
        if engine._prefixes.get(old) is not None:
            raise torch.OutOfMemoryError("out of memory")
        return run(cache, **inputs)

    monkeypatch.setattr(engine, "_hidden", fails_beside_the_old_one)
    assert score(engine, [(new, [(9, 1)])]) == [[pytest.approx(engine.plain_score(new, (9, 1)), abs=1e-4)]]
    assert engine._prefixes.get(old) is None
    assert engine.token_budget == 64


def test_memory_that_never_suffices_is_an_error_even_for_many_answers_of_one_token(llama, monkeypatch):
    engine = Engine(llama, token_budget=64)

    def fails(*args, **inputs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine, "_hidden", fails)
    with pytest.raises(LLMError, match="Out of memory"):  # they are one row, which no budget splits
        score(engine, [((3, 4), [(5,), (6,), (7,)])])
    monkeypatch.setattr(llama, "forward", fails)
    with pytest.raises(LLMError, match="Out of memory"):
        engine.plain_score((3, 4), (5, 1))


def test_whole_rows_ask_the_output_layer_for_scored_positions_only_a_chunk_at_a_time(tmp_path, llama, monkeypatch):
    monkeypatch.setattr(output_layer, "_CHUNK", 4)
    asked: list[int] = []

    def count(module, inputs, output):
        asked.append(inputs[0].shape[:-1].numel())

    prompt, texts = tuple(range(3, 33)), [tuple(range(40, 46)), (50, 1)]
    mamba = load(make_tiny_llm(tmp_path, architecture="mamba"))
    engine = Engine(mamba, token_budget=4096)
    with mamba.get_output_embeddings().register_forward_hook(count):
        scores = score(engine, [(prompt, texts)])[0]
    assert sum(asked) == sum(map(len, texts))
    assert max(asked) <= 4
    for model, expected in ((mamba, scores), (llama, score(Engine(llama, token_budget=64), [(prompt, texts)])[0])):
        engine = Engine(model, token_budget=4096)
        asked.clear()
        with model.get_output_embeddings().register_forward_hook(count):
            assert [engine.plain_score(prompt, ids) for ids in texts] == pytest.approx(expected, abs=1e-4)
        assert asked == list(map(len, texts))  # of 30 positions of the prompt only the last


@pytest.mark.parametrize("max_nodes", [0, 1, 7, 10_000])
def test_rows_hold_every_continuation_once(max_nodes):
    (_, continuations), *_ = random_requests(5, continuations=30)
    rows = plan_rows((9, 9), continuations, max_nodes=max_nodes)
    assert sorted(ids for row in rows for ids in row.continuations) == sorted(continuations)
    for row in rows:
        assert row.prompt == (9, 9)
        assert row.num_nodes == unique_nodes(row.continuations)
        assert row.num_nodes <= max_nodes + 11 or len(row.continuations) == 1
    assert len(rows) == {0: len(continuations), 10_000: 1}.get(max_nodes, len(rows))


def test_batches_keep_to_the_budget_and_the_padding():
    rng = random.Random(6)
    rows = [PackedRow(random_ids(rng, rng.randrange(1, 20)), (), rng.randrange(0, 50)) for _ in range(200)]
    batches = list(batch_rows(rows, token_budget=300, slack=20))
    assert sorted((row for batch in batches for row in batch), key=id) == sorted(rows, key=id)
    for batch in batches:
        padded = len(batch) * max(row.num_nodes for row in batch)
        assert padded <= 300
        assert padded <= max(20, 1.05 * sum(row.num_nodes for row in batch))
    assert [len(batch) for batch in batch_rows(rows[:2], token_budget=1, slack=0)] == [1, 1]


def test_masks_and_positions_of_a_small_trie():
    rows = [PackedRow((7, 7), ((3, 4, 1), (3, 5, 1)), 3), PackedRow((8,), ((6, 1),), 1)]
    batch = PackedBatch(rows)
    assert batch.ids.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert batch.positions.tolist() == [[2, 3, 3], [1, 0, 0]]
    assert batch.real.tolist() == [[True, True, True], [True, False, False]]
    mask = batch.trie_mask(torch.float32, torch.device("cpu"))
    assert mask.shape == (2, 1, 3, 5)
    assert (mask == 0).int()[:, 0].tolist() == [
        [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 0, 1]],
        [[1, 0, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 0, 1]],
    ]
    pairs = sorted(zip(batch.sources.tolist(), batch.targets.tolist(), strict=True))
    assert pairs == [(-2, 6), (-1, 3), (0, 4), (0, 5), (1, 1), (2, 1), (3, 1)]
    edges = torch.tensor([-float(10**k) for k in range(7)], dtype=torch.float64)
    edge = {
        pair: edges[n].item()
        for n, pair in enumerate(zip(batch.sources.tolist(), batch.targets.tolist(), strict=True))
    }
    assert batch.sums(edges) == [
        edge[-1, 3] + edge[0, 4] + edge[1, 1],
        edge[-1, 3] + edge[0, 5] + edge[2, 1],
        edge[-2, 6] + edge[3, 1],
    ]
