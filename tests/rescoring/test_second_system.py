"""Other recognisers' transcripts as members at inference."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import write_manifest

from nemo_llm_feedback.cli.jobs import transcribe as job
from nemo_llm_feedback.cli.main import main
from nemo_llm_feedback.core.config.rescoring import parse_rescoring_config
from nemo_llm_feedback.core.errors import ConfigError
from nemo_llm_feedback.core.types import Context, ExternalText
from nemo_llm_feedback.rescoring import enable_rescoring, utterance_contexts
from nemo_llm_feedback.rewards import register
from nemo_llm_feedback.rewards.rules import CallableReward
from nemo_llm_feedback.training.models import restore


@register("test_second_system_likes_tea")
def tea_reward() -> CallableReward:
    """Only `one tea` is worth anything."""

    def judge(texts: list[str], sources: list[str]) -> list[float]:
        return [1000.0 * (text == "one tea") for text in texts]

    return CallableReward(judge, name="tea")


@pytest.mark.parametrize("kind", ["ctc_char", "rnnt_bpe", "tdt_char"])
def test_a_second_system_s_text_is_chosen_where_the_reward_prefers_it(
    kind: str, nemo_file: Any, tmp_path: Path
) -> None:
    manifest = write_manifest(
        tmp_path / "m.json", [None, None], hypotheses=[[{"text": "1 Tea!", "source": "cloud"}], []]
    )
    settings: dict[str, Any] = {
        "reward": {"name": "test_second_system_likes_tea"},
        "context": {"description": "an order"},
    }
    found = job.transcribe(nemo_file(kind), manifest=manifest, rescoring=settings)
    first, second = (hyp for _, hyp in found.worked)
    assert first.text.strip() == "one tea"
    assert first.n_best[0].source == "cloud"
    assert "cloud" not in {member.source for member in second.n_best}
    without = job.transcribe(nemo_file(kind), manifest=manifest, rescoring={**settings, "external": 0})
    assert [hyp.text for _, hyp in without.worked][1] == second.text
    assert "cloud" not in {member.source for _, hyp in without.worked for member in hyp.n_best}
    assert job.transcribe(nemo_file(kind), manifest=manifest).hypotheses[0].text.strip() != "one tea"


def test_texts_that_cannot_be_written_are_named_where_they_would_be_rescored(
    nemo_file: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = write_manifest(tmp_path / "m.json", [None], hypotheses=[["чай", "tea"]])
    with caplog.at_level(logging.WARNING, logger="nemo_logger"):
        job.transcribe(nemo_file("ctc_char"), manifest=manifest)
        assert not any("чай" in record.getMessage() for record in caplog.records)
        job.transcribe(nemo_file("ctc_char"), manifest=manifest, rescoring={"reward": None, "nbest": 2})
    assert sum("1 of 2 texts under `hypotheses`" in record.getMessage() for record in caplog.records) == 1


def test_texts_are_announced_beside_contexts_in_nemo_code(nemo_file: Any) -> None:
    model = restore(nemo_file("ctc_char"), map_location="cpu").eval()
    enable_rescoring(model)
    torch.manual_seed(0)
    log_probs = torch.randn(2, 20, len(model.decoder.vocabulary) + 1).log_softmax(-1)
    lengths = torch.tensor([20, 20])
    texts = [(ExternalText("a latte", "cloud"),), ()]
    with utterance_contexts(model, ["a", "b"], [Context(), Context()], texts):
        found = model.decoding.ctc_decoder_predictions_tensor(log_probs, lengths, return_hypotheses=True)
    assert ("a latte", "cloud") in {(member.text, member.source) for member in found[0].n_best}
    assert "cloud" not in {member.source for member in found[1].n_best}


def test_a_language_that_num2words_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="language must be one of"):
        parse_rescoring_config({"language": "klingon", "reward": None})


def test_score_shows_the_sources_and_the_oracle_with_and_without_them(
    nemo_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_manifest(tmp_path / "dev.json", ["one tea"], hypotheses=[[{"text": "1 tea", "source": "cloud"}]])
    out = tmp_path / "s.json"
    command = ["score", str(nemo_file("ctc_char")), "--manifest", str(manifest), "--description", "an order"]
    command += ["--json", str(out), "--set", "reward.name=length", "proposals.boosted=0"]
    assert main(command) == 0
    assert "cloud" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["systems"]["oracle"]["wer"] == 0.0
    (member,) = [member for member in record["utterances"][0]["members"] if member["text"] == "one tea"]
    assert member["sources"] == ["cloud"]
    assert main([*command, "proposals.external=0"]) == 0
    assert json.loads(out.read_text())["systems"]["oracle"]["wer"] > 0.0
