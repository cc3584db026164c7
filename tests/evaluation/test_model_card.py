"""The model card: the numbers with intervals, nothing that acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from nemo_llm_feedback.core.text import basic
from nemo_llm_feedback.evaluation.metrics import score_corpus
from nemo_llm_feedback.evaluation.model_card import public_name, write_model_card
from nemo_llm_feedback.training.callbacks.guards import gain_name

FACTS = {
    "plugin": "nemo_llm_feedback 0.1.0",
    "base": "base.nemo",
    "llm": "a/b",
    "objective": "distill",
    "steps": 200,
    "context_sha256": "ab" * 32,
    "before": {"dev": {"wer": 50.0, "ewer": 80.0}},
    "after": {"dev": {"wer": 25.0}},
}


def test_before_and_after_with_intervals(tmp_path: Path) -> None:
    before, after = (
        score_corpus(["a b", "c d"], texts, normalize=basic, entities=[["b"], []])
        for texts in (["a x", "c y"], ["a b", "c y"])
    )
    path = write_model_card(
        tmp_path / "m.nemo", facts=FACTS, before={"dev": before}, after={"dev": after}, normalizer="basic"
    )
    assert path == tmp_path / "m.md"
    text = path.read_text()
    assert "| before | 50.0 [50.0, 50.0] |" in text
    assert "| after | 25.0 [0.0, 50.0] (−50.0 %)" in text
    assert "EWER ↓ (%)" in text
    assert "2 utterances; 95 % intervals" in text
    for fact in ("`base.nemo`", "`a/b`", "`distill`", "`200`", "ab" * 32, "restore_from('m.nemo')", "licence"):
        assert fact in text


def test_a_gain_that_was_measured_on_trained_rows_is_called_so(tmp_path: Path) -> None:
    for rows, name in ((0, "per trained utterance (none was held out): `1.5`"), (8, "per held-out utterance: `1.5`")):
        facts = {**FACTS, "gain": 1.5, "held_out_rows": rows}
        path = write_model_card(tmp_path / "m.nemo", facts=facts, before={}, after={}, normalizer="basic")
        assert f"Reward gained {name}" in path.read_text()
    assert [gain_name(0), gain_name(8)] == ["gain on trained rows", "held-out gain"]


def front_matter(path: Path) -> dict[str, Any]:
    _, head, body = path.read_text().split("---\n", 2)
    assert body.startswith("\n# ")
    return yaml.safe_load(head)


def test_the_hub_can_file_it(tmp_path: Path) -> None:
    name = "nvidia/stt_de_conformer_ctc_large"
    facts = FACTS | {"base": "stt_de_conformer_ctc_large.nemo", "base_model": name}
    found = front_matter(write_model_card(tmp_path / "m.nemo", facts=facts))
    assert (found["library_name"], found["language"], found["base_model"]) == ("nemo", "de", name)
    assert found["metrics"] == ["wer", "cer"]
    assert "automatic-speech-recognition" in found["tags"]
    local = front_matter(write_model_card(tmp_path / "m.nemo", facts={"base": "base.nemo", "base_model": None}))
    assert not {"language", "base_model", "metrics"} & set(local)  # not known, or not on the Hub


def test_it_has_what_the_run_chose_and_how_it_went(tmp_path: Path) -> None:
    known = {"learning_rate": 0.0003, "reward": "llm, alpha 1.4, beta 2.8", "boosting_weight": 1.5, "kept_step": 70}
    known |= {"pool_rows": 269, "pool_hours": 0.61, "gain": 12.5, "general_wer_rise": 0.021, "share": 0.75}
    text = write_model_card(tmp_path / "m.nemo", facts=FACTS | known | {"ended": "too far away"}).read_text()
    for value in (*known.values(), "too far away"):
        assert f": `{value}`\n" in text
    plain = write_model_card(tmp_path / "m.nemo", facts=FACTS | {"ended": "", "share": 1.0, "gain": 1 / 3}).read_text()
    assert "ended early" not in plain
    assert "Share of" not in plain
    assert ": `0.3333`\n" in plain


def test_without_scores_it_has_the_numbers_of_the_checkpoint(tmp_path: Path) -> None:
    text = write_model_card(tmp_path / "m.nemo", facts=FACTS).read_text()
    assert "| WER (%) | 50.0 | 25.0 |" in text
    assert "EWER" not in text


def test_without_measurements_it_says_so(tmp_path: Path) -> None:
    text = write_model_card(tmp_path / "m.nemo", facts={"base": "b.nemo"}).read_text()
    assert "nothing was measured" in text
    assert "Language model (" not in text


def test_only_a_context_that_learned_is_set_in_the_code(tmp_path: Path) -> None:
    """A card without the fact set an empty context, in which the encoder fails."""
    for facts, code in (({}, None), ({"look_ahead": None}, None), ({"look_ahead": [70, 13]}, "[70, 13]")):
        text = write_model_card(tmp_path / "m.nemo", facts={"base": "b.nemo", **facts}).read_text()
        assert ("set_default_att_context_size" in text) == (code is not None)
        assert code is None or f"model.encoder.set_default_att_context_size({code})" in text


def test_a_local_folder_of_the_llm_is_shown_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "private" / "lm").mkdir(parents=True)
    facts = FACTS | {"llm": str(tmp_path / "private" / "lm")}
    text = write_model_card(tmp_path / "m.nemo", facts=facts).read_text()
    assert "training only): `lm`" in text
    assert "private" not in text
    assert public_name("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    assert public_name("/gone/folder/lm") == "lm"


def test_names_cannot_break_out(tmp_path: Path) -> None:
    evil = "`x`\n# <script>alert(1)</script> | [a](b)"
    text = write_model_card(
        tmp_path / "a_[b].nemo", facts={"base": evil, "before": {evil: {"wer": 1.0}}, "after": {evil: {"wer": 2.0}}}
    ).read_text()
    assert "\n# <script>" not in text
    assert "`` `x` # <script>alert(1)</script> / [a](b) ``" in text
    assert r"### \`x\` \# \<script\>alert\(1\)\</script\> \| \[a\]\(b\)" in text
    assert r"# a\_\[b\]" in text
