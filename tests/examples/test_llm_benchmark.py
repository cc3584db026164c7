"""The benchmark of LLM scoring runs, counts tokens right, and all its ways give the same scores."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from helpers.scripts import load_script


@pytest.fixture(scope="module")
def bench() -> Any:
    return load_script("examples/benchmarks/llm_scoring.py")


def test_quick_run(bench, tmp_path, monkeypatch, capsys):
    file = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["llm_scoring.py", "--quick", "--device", "cpu", "--json", str(file)])
    bench.main()
    assert "storage contexts  way" in capsys.readouterr().out
    report = json.loads(file.read_text())
    assert set(report["ratios"]) == {"run_context_speedup", "utterance_context_speedup", "padding"}
    results = {(r["storage"], r["contexts"], r["way"]): r for r in report["results"]}
    assert len(results) == 12
    for (_, kind, way), result in results.items():
        assert result["seconds"] > 0
        assert result["max_difference"] < 1e-3
        assert result["unique"] <= result["tokens"]
        if way == "naive":
            assert result["tokens"] == 16 * (40 + 7)
            assert (result["speedup"], result["cpu_speedup"]) == (1.0, 1.0)
        else:
            prompts = 40 if kind == "run" else 4 * 40
            assert prompts < result["unique"] <= prompts + 16 * 7
            # Padding: batches of at most 64 tokens may have any share of it.
            limit = result["unique"] * 1.05 + 64 if way == "trie" else prompts + 16 * 7
            assert result["tokens"] <= limit
    first = [results["fp32", kind, "trie"] for kind in ("run", "utterance")]
    assert report["ratios"]["run_context_speedup"] == round(first[0]["speedup"], 2)
    assert report["cpu_time_ratios"]["utterance_context_speedup"] == round(first[1]["cpu_speedup"], 2)
    worst = max(r["tokens"] / r["unique"] - 1 for r in report["results"] if r["way"] == "trie")
    assert report["ratios"]["padding"] == round(worst, 4)


def test_the_workload_is_what_the_table_says(bench):
    for run_wide in (False, True):
        requests = bench.make_requests(bench.Workload(), 500, run_wide=run_wide)
        assert len(requests) == (1 if run_wide else 16)
        assert sum(len(texts) for _, texts in requests) == 128
        assert all(len(prompt) == 300 for prompt, _ in requests)
        assert all(len(text) == 20 and text[-1] == 1 for _, texts in requests for text in texts)
        assert requests == bench.make_requests(bench.Workload(), 500, run_wide=run_wide)
    assert bench.unique_tokens([((7, 8), [(3, 4, 1), (3, 5, 1), (3, 1)]), ((7, 8, 9), [(1,)])]) == 2 + 3 + 3


def test_nf4_packs_every_matrix_of_the_blocks(bench):
    from bitsandbytes.nn import Linear4bit

    model = bench.make_llama("tiny", torch.device("cpu"))
    stored = bench.to_nf4(model)
    layers = [m for m in stored.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(layers) == 2 * 7
    assert all(isinstance(m, Linear4bit) and m.weight.dtype == torch.uint8 for m in layers)
    assert all(m.weight.quant_state.nested for m in layers)
    requests = bench.make_requests(bench.Workload(1, 2, 4, 8), 500, run_wide=False)
    plain, packed = (bench.score_naive(m, requests, batch=2)[0] for m in (model, stored))
    assert plain != packed
    assert plain == pytest.approx(packed, rel=0.1)


def test_the_naive_way_stops_searching_when_batches_no_longer_help(bench, monkeypatch):
    tried = []

    def timed(run):
        run()
        batch = tried[-1]
        return bench.Clock(wall=float(max(batch, 1)) * abs(batch - 4.1), cpu=0.0)  # a row is cheapest at 4

    def score_naive(model, rows, *, batch):
        tried.append(batch)

    monkeypatch.setattr(bench, "timed", timed)
    monkeypatch.setattr(bench, "score_naive", score_naive)
    requests = bench.make_requests(bench.Workload(context_length=3), 500, run_wide=False)
    assert bench.best_batch(None, requests) == 4
    assert tried == [1, 1, 2, 4, 8, 16, 32]
