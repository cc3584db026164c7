"""The remote reward: equal to the local one, and honest about every fault of a server."""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.stub_server import Stub, serve
from helpers.tiny_llm import make_tiny_llm, make_tiny_tokenizer

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError, RewardError
from nemo_llm_feedback.core.types import Context, Hypothesis, HypothesisGroup
from nemo_llm_feedback.llm import LLMScorer, load_llm
from nemo_llm_feedback.llm.view import LLMView
from nemo_llm_feedback.rewards import LLMReward, RemoteReward, RemoteScorer, build_reward, parse_remote
from nemo_llm_feedback.rewards.remote import client as client_module

ORDER = Context("an order at a coffee shop", ("oat milk", "latte"))
MUSIC = Context("a command to a loudspeaker")
TEXTS = ["an iced latte with oat milk", "a nice latte with oat milk", "", "an iced latte", "größe 東京"]
BETA = 2.0


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llm(tmp_path_factory.mktemp("remote_llm"), chat=True)


@pytest.fixture(scope="module")
def local(llm: Path) -> LLMScorer:
    return load_llm(LLMConfig(model=str(llm), quantization="none", device="cpu"))


@pytest.fixture(scope="module")
def running(llm: Path) -> Iterator[Stub]:
    with serve(llm) as stub:
        yield stub


@pytest.fixture
def stub(running: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    running.reset()
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.01)
    return running


def settings(stub: Stub, llm: Path, **changes: Any) -> dict[str, Any]:
    base = {"base_url": stub.url, "model": "tiny", "tokenizer": str(llm), "deadline_s": 30.0}
    return {**base, **changes}


def scorer(stub: Stub, llm: Path, **changes: Any) -> RemoteScorer:
    return RemoteScorer(parse_remote(settings(stub, llm, **changes)))


def group(name: str, texts: list[str], context: Context = ORDER) -> HypothesisGroup:
    members = tuple(Hypothesis(text, tuple(range(n + 1))) for n, text in enumerate(texts))
    return HypothesisGroup(name, members, context, tuple(-1.0 - n for n in range(len(texts))))


def remote_reward(stub: Stub, llm: Path, *, cache: Any = None, **changes: Any) -> RemoteReward:
    made = build_reward("remote", settings=settings(stub, llm, **changes), alpha=1.0, beta=BETA, cache=cache)
    assert isinstance(made, RemoteReward)
    return made


def sums(scores: Any) -> list[list[float]]:
    return [[score.logp for score in row] for row in scores]


# -- the scores --


@pytest.mark.parametrize("chat", ["off", "on"])
def test_scores_equal_the_local_llms(stub: Stub, llm: Path, local: LLMScorer, chat: str) -> None:
    if chat == "off":
        local = load_llm(LLMConfig(model=str(llm), quantization="none", device="cpu", chat="off"))
    requests = [(ORDER, TEXTS), (MUSIC, TEXTS[:2]), (Context(), ["turn it on"]), (ORDER, TEXTS[1:3])]
    ours = scorer(stub, llm, chat=chat, batch_size=2).score(requests)
    reference = local.score(requests)
    assert [[s.num_tokens for s in row] for row in ours] == [[s.num_tokens for s in row] for row in reference]
    for row, expected in zip(sums(ours), sums(reference), strict=True):
        assert row == pytest.approx(expected, abs=1e-4)


def test_the_servers_requests_hold_token_ids_one_prompt_each_and_no_text_twice(stub: Stub, llm: Path) -> None:
    remote = scorer(stub, llm, batch_size=3)
    stub.bodies.clear()
    remote.score([(ORDER, TEXTS), (MUSIC, TEXTS[:1]), (ORDER, TEXTS)])
    sent = [body["prompt"] for body in stub.bodies]
    assert sorted(map(len, sent)) == [1, 2, 3]
    assert len({tuple(ids) for batch in sent for ids in batch}) == len(TEXTS) + 1
    prompt = list(remote.encoder.encode_prompt(ORDER))
    whole = [prompt + list(remote.encoder.encode_text(text)) for text in TEXTS]
    assert all(ids in [i for batch in sent for i in batch] for ids in whole)


@pytest.mark.parametrize("normalize", ["sum", "token", "word", "pmi"])
def test_the_reward_equals_the_local_one_and_asks_once(
    stub: Stub, llm: Path, local: LLMScorer, normalize: str
) -> None:
    groups = [group("a", TEXTS), group("b", TEXTS[:3], MUSIC)]
    keywords: dict[str, Any] = {"alpha": 0.7, "beta": BETA, "normalize": normalize, "asr_weight": 0.5}
    expected = LLMReward(local, **keywords)(groups)
    ours = build_reward("remote", settings=settings(stub, llm), **keywords)
    assert ours.name == "remote"
    output = ours(groups)
    torch.testing.assert_close(output.values, expected.values, atol=1e-3, rtol=0, equal_nan=True)
    for name, part in expected.parts.items():
        torch.testing.assert_close(output.parts[name], part, atol=1e-3, rtol=0, equal_nan=True)
    stub.bodies.clear()
    torch.testing.assert_close(ours(groups).values, output.values, equal_nan=True)
    assert not stub.bodies


def test_random_states_are_left_alone(stub: Stub, llm: Path) -> None:
    random.seed(3)
    torch.manual_seed(3)
    before = random.getstate(), torch.get_rng_state()
    remote = scorer(stub, llm)
    stub.faults.extend(["500", "503"])
    remote.score([(ORDER, TEXTS)])
    assert remote.client.num_retries == 2
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_what_the_llm_cannot_read_is_nan_and_no_failure(stub: Stub, llm: Path, caplog: Any) -> None:
    reward = remote_reward(stub, llm)
    long = "latte " * 600
    values = reward([group("a", ["a latte", long])]).values[0]
    assert math.isfinite(values[0])
    assert math.isnan(values[1])
    assert reward.failed.num_failed == 0
    assert "longer than the LLM can read" in caplog.text


def test_answers_in_another_order_are_read(stub: Stub, llm: Path) -> None:
    remote = scorer(stub, llm)
    expected = sums(remote.score([(ORDER, TEXTS)]))
    stub.faults.append("other_order")
    assert sums(remote.score([(ORDER, TEXTS)])) == expected


# -- faults that pass --


@pytest.mark.parametrize("fault", ["500", "503", "408", "cut", "half_json", "html"])
def test_passing_faults_are_tried_again(stub: Stub, llm: Path, fault: str) -> None:
    remote = scorer(stub, llm)
    expected = sums(remote.score([(ORDER, TEXTS)]))
    stub.faults.extend([fault, fault])
    assert sums(remote.score([(ORDER, TEXTS)])) == expected
    assert (remote.client.num_retries, remote.num_failed_requests) == (2, 0)


def test_retry_after_is_obeyed(stub: Stub, llm: Path) -> None:
    remote = scorer(stub, llm)
    stub.faults.append("429")
    start = time.monotonic()
    assert math.isfinite(sums(remote.score([(ORDER, TEXTS[:1])]))[0][0])
    assert time.monotonic() - start >= 1.0


def test_a_longer_retry_after_than_the_deadline_is_not_waited_for(stub: Stub, llm: Path) -> None:
    remote = scorer(stub, llm, deadline_s=20.0)
    stub.always, stub.retry_after = "429", 60
    start = time.monotonic()
    assert math.isnan(sums(remote.score([(ORDER, TEXTS[:1])]))[0][0])
    assert time.monotonic() - start < 15.0


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_server_that_does_not_finish_is_cut_off_and_asked_again(stub: Stub, llm: Path, fault: str) -> None:
    remote = scorer(stub, llm, timeout_s=1.0)
    expected = sums(remote.score([(ORDER, TEXTS[:2])]))
    stub.faults.append(fault)
    start = time.monotonic()
    assert sums(remote.score([(ORDER, TEXTS[:2])])) == expected
    assert 1.0 <= time.monotonic() - start < 15.0, "the stub would hang for 30 s"
    assert remote.client.num_retries >= 1


def test_the_deadline_holds_for_all_requests_together(stub: Stub, llm: Path) -> None:
    remote = scorer(stub, llm, timeout_s=0.5, deadline_s=3.0, max_in_flight=1, batch_size=1, retries=50)
    stub.always = "hang"
    start = time.monotonic()
    assert all(math.isnan(logp) for row in sums(remote.score([(ORDER, TEXTS)])) for logp in row)
    assert time.monotonic() - start < 15.0, "51 attempts at each of 5 texts would take two minutes"
    assert remote.num_failed_requests == len(TEXTS)


def test_waits_grow_with_jitter_and_have_a_limit(stub: Stub, llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "random", SimpleNamespace(Random=lambda: random.Random(0)))
    remote = scorer(stub, llm, retries=11, deadline_s=1e6)
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.5)
    waits: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=waits.append)
    monkeypatch.setattr(client_module, "time", clock)
    stub.always = "500"
    for _ in range(8):
        remote.score([(ORDER, TEXTS[:1])])
    by_attempt = list(zip(*[waits[start : start + 11] for start in range(0, len(waits), 11)], strict=True))
    for attempt, longest in ((1, 0.5), (3, 2.0), (11, 30.0)):
        drawn = by_attempt[attempt - 1]
        assert 0 <= min(drawn) < 0.6 * longest
        assert 0.4 * longest < max(drawn) <= longest


def test_requests_in_flight_are_bounded_and_several(stub: Stub, llm: Path) -> None:
    remote = scorer(stub, llm, batch_size=1, max_in_flight=3)
    stub.slow = 0.05
    remote.score([(ORDER, TEXTS), (MUSIC, TEXTS)])
    assert stub.most_in_flight == 3


# -- faults that stay --


@pytest.mark.parametrize(
    "fault",
    ["missing", "off_by_one", "reorder", "truncate", "fewer", "nan", "null", "positive", "400", "422"],
)
def test_a_wrong_answer_fails_its_group_and_is_not_kept(stub: Stub, llm: Path, fault: str, caplog: Any) -> None:
    reward = remote_reward(stub, llm, max_in_flight=1)
    groups = [group("a", TEXTS[:3]), group("b", TEXTS, MUSIC)]
    stub.faults.append(fault)
    output = reward(groups)
    assert output.values[0].isnan().all()
    assert all(part[0].isnan().all() for part in output.parts.values())
    assert output.values[1].isfinite().all()
    assert (reward.failed.num_groups, reward.failed.num_failed) == (2, 1)
    assert "1 of 2 groups got no reward" in caplog.text
    stub.bodies.clear()
    again = reward(groups)
    assert again.values[0, :3].isfinite().all()
    assert len(stub.bodies) == 1, "only what failed is asked for again"
    assert reward.failed.num_failed == 1


@pytest.mark.parametrize("index", ["true", '"1"', "1.0", "null", "[1]", '{"1": 1}', "-1", "1" + "0" * 40, "0"])
def test_an_index_of_another_type_or_range_fails_its_group(stub: Stub, llm: Path, index: str, caplog: Any) -> None:
    reward = remote_reward(stub, llm, max_in_flight=1)
    stub.faults.append(f"index={index}")
    assert reward([group("a", TEXTS[:2])]).values.isnan().all()  # 1.0 and true equal the right one
    assert "with the indices" in caplog.text
    assert reward([group("a", TEXTS[:2])]).values.isfinite().all()


@pytest.mark.parametrize("name", [None, 5, True, 1.5, ["tiny"], {"tiny": "tiny"}, "tin", "x" * 10**6])
def test_a_model_whose_id_is_no_text_or_another_is_not_taken_for_the_one_asked_for(
    stub: Stub, llm: Path, monkeypatch: pytest.MonkeyPatch, name: Any
) -> None:
    monkeypatch.setattr(stub, "models", [{"id": name}, "tiny", None, ["tiny"], {}])
    with pytest.raises(RewardError, match=r"does not serve reward\.settings\.model=tiny; it serves") as error:
        scorer(stub, llm)
    assert len(str(error.value)) < 1000
    monkeypatch.setattr(stub, "models", [{"id": name}, None, {"id": "tiny", "root": [name]}])
    assert scorer(stub, llm).score([(ORDER, TEXTS[:1])])


def test_one_failed_text_takes_its_whole_group_and_no_other(stub: Stub, llm: Path) -> None:
    reward = remote_reward(stub, llm, batch_size=1, retries=0)
    bad = list(reward.remote.encoder.encode_text(TEXTS[1]))
    stub.poison = lambda ids: ids[-len(bad) :] == bad
    values = reward([group("a", TEXTS), group("b", TEXTS[2:])]).values
    assert values[0].isnan().all()
    assert values[1, :3].isfinite().all()


def test_a_failed_context_free_score_fails_the_group_under_pmi(stub: Stub, llm: Path) -> None:
    keywords: dict[str, Any] = {"alpha": 1.0, "beta": BETA, "normalize": "pmi"}
    reward = build_reward("remote", settings=settings(stub, llm, retries=0, batch_size=1), **keywords)
    assert isinstance(reward, RemoteReward)
    bad = [*reward.remote.encoder.encode_prompt(Context()), *reward.remote.encoder.encode_text(TEXTS[0])]
    stub.poison = lambda ids: ids == bad
    values = reward([group("a", TEXTS[:2]), group("b", TEXTS[2:4])]).values
    assert values[0].isnan().all()
    assert values[1].isfinite().all()
    assert reward.failed.num_failed == 1


def test_the_llm_reads_the_groups_view_of_it(stub: Stub, llm: Path, local: LLMScorer) -> None:
    reward = remote_reward(stub, llm, truecasing="english", max_terms=1, retries=0, batch_size=1)
    view = LLMView(max_terms=1, truecasing="english")
    groups = [group("a", ["can i have an oat milk latte", "can i have a latte"]), group("b", ["i do"], MUSIC)]
    expected = LLMReward(local, alpha=1.0, beta=BETA, view=view)(groups)
    torch.testing.assert_close(reward(groups).values, expected.values, atol=1e-3, rtol=0, equal_nan=True)
    bad = list(reward.remote.encoder.encode_text(view(group("c", ["play it again"])).texts[0]))
    stub.poison = lambda ids: ids[-len(bad) :] == bad
    assert reward([group("c", ["play it again", "play it"])]).values.isnan().all()


def test_too_many_failed_groups_stop_the_run(stub: Stub, llm: Path) -> None:
    reward = remote_reward(stub, llm, retries=0, batch_size=1)
    bad = list(reward.remote.encoder.encode_text("no answer"))
    stub.poison = lambda ids: ids[-len(bad) :] == bad
    good = [group(f"g{n}", [f"latte {n}"]) for n in range(8)]
    reward(good)
    reward([group("x", ["no answer"]), group("y", ["no answer"])])  # 2 of 10
    assert (reward.failed.num_groups, reward.failed.num_failed) == (10, 2)
    with pytest.raises(RewardError, match=r"failed 3 of the last 11 groups.*max_failed=0\.2"):
        reward([group("z", ["no answer"])])


def test_a_server_that_dies_late_stops_the_run_soon(stub: Stub, llm: Path) -> None:
    reward = remote_reward(stub, llm, retries=0)
    for _ in range(10):
        reward([group(f"g{n}", TEXTS[:1]) for n in range(50)])
    stub.always = "500"
    for k in range(2):
        reward([group("x", [f"lost {k} {n}"]) for n in range(8)])
    with pytest.raises(RewardError, match="failed 24 of the last 100 groups"):
        reward([group("x", [f"lost at last {n}"]) for n in range(8)])


@pytest.mark.parametrize(("status", "words"), [("401", "api_key_env"), ("404", "base_url"), ("307", "redirects")])
def test_a_refusal_stops_at_once(stub: Stub, llm: Path, status: str, words: str) -> None:
    remote = scorer(stub, llm, batch_size=1, max_in_flight=1)
    stub.bodies.clear()
    stub.always = status
    with pytest.raises(RewardError, match=words):
        remote.score([(ORDER, TEXTS)])
    assert len(stub.bodies) < len(TEXTS)


# -- the start-up check --


@pytest.mark.parametrize(
    "fault",
    ["missing", "off_by_one", "shifted_values", "reorder", "truncate", "fewer", "nan", "null", "positive"],
)
def test_the_start_up_check_refuses_a_server_that_answers_wrongly(stub: Stub, llm: Path, fault: str) -> None:
    stub.always = fault
    with pytest.raises(RewardError, match=r"start-up check|log-probabilities are not"):
        scorer(stub, llm)


def test_the_start_up_check_compares_with_a_local_llm(stub: Stub, llm: Path, tmp_path: Path) -> None:
    scorer(stub, llm, check_against=str(llm))
    other = make_tiny_llm(tmp_path / "other", chat=True, seed=1)
    with pytest.raises(RewardError, match="check_against"):
        scorer(stub, llm, check_against=str(other))


def test_a_wrong_model_name_and_an_unknown_length_are_named(stub: Stub, llm: Path) -> None:
    with pytest.raises(RewardError, match=r"does not serve .*huge; it serves tiny"):
        scorer(stub, llm, model="huge")
    stub.max_model_len = None
    with pytest.raises(RewardError, match="max_model_len"):
        scorer(stub, llm)
    scorer(stub, llm, max_model_len=512)


def test_a_server_that_is_not_there_is_an_error_within_the_deadline(llm: Path) -> None:
    config = {"base_url": "http://127.0.0.1:9", "model": "tiny", "tokenizer": str(llm), "deadline_s": 0.5}
    start = time.monotonic()
    with pytest.raises(RewardError, match=r"127\.0\.0\.1:9.*attempt"):
        RemoteScorer(parse_remote(config))
    assert time.monotonic() - start < 10.0


# -- the size of answers --


@pytest.mark.parametrize("fault", ["huge", "endless", "gzip"])
def test_answers_are_bounded_in_size_also_after_decompression(
    stub: Stub, llm: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remote = scorer(stub, llm)
    monkeypatch.setattr(client_module, "_LARGEST", 2**16)
    stub.always = fault
    start = time.monotonic()
    assert math.isnan(sums(remote.score([(ORDER, TEXTS[:1])]))[0][0])
    assert time.monotonic() - start < 15.0
    assert remote.client.num_retries == 0
    assert ("compressed" if fault == "gzip" else "larger than 65536 bytes") in caplog.text


def test_the_client_is_an_extra_that_an_error_names(stub: Stub, llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, client_module.__name__)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RewardError, match=r"pip install 'nemo_llm_feedback\[remote\]'"):
        scorer(stub, llm)


# -- keys, settings, cache --


def test_the_key_is_sent_and_never_shown(
    stub: Stub, llm: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key = "sk-very-secret-1234"
    monkeypatch.setenv("SCORING_KEY", key)
    stub.key = key
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "someone-elses")
    remote = scorer(stub, llm, api_key_env="SCORING_KEY")
    assert "someone-elses" not in str(stub.headers)
    assert {headers["Authorization"] for headers in stub.headers} == {f"Bearer {key}"}
    assert key not in remote.identity + repr(remote.__dict__) + caplog.text
    stub.key = "another"
    with pytest.raises(RewardError) as error:
        remote.score([(ORDER, TEXTS)])
    assert "***" in str(error.value)
    stub.key, stub.prefix = "another", "x" * 270  # the key lies where the message is cut
    with pytest.raises(RewardError) as error:
        remote.score([(ORDER, TEXTS)])
    assert key[:4] not in str(error.value)
    assert key not in str(error.value) + caplog.text
    with pytest.raises(RewardError, match="wants a key"):
        scorer(stub, llm)


def test_a_folder_without_a_tokenizer_is_an_error(stub: Stub, tmp_path: Path) -> None:
    with pytest.raises(LLMError, match=r"reward\.settings\.tokenizer"):
        scorer(stub, tmp_path)


def test_the_identity_follows_what_scores_depend_on(stub: Stub, llm: Path, tmp_path: Path) -> None:
    base = scorer(stub, llm).identity
    template = tmp_path / "template.txt"
    template.write_text("Order: {terms}\n{hypothesis}", encoding="utf-8")
    make_tiny_tokenizer(tmp_path / "tokenizer", chat=True, bos=False)
    for changes in (
        {"version": "2"},
        {"chat": "off"},
        {"max_context_tokens": 99},
        {"template": str(template)},
        {"tokenizer": str(tmp_path / "tokenizer")},
    ):
        assert scorer(stub, llm, **changes).identity != base
    for changes in ({"timeout_s": 9.0}, {"batch_size": 2}, {"base_url": stub.url + "/v1"}):
        assert scorer(stub, llm, **changes).identity == base


def test_scores_survive_in_a_file_and_another_model_under_the_same_name_is_noticed(
    stub: Stub, llm: Path, tmp_path: Path
) -> None:
    cache = str(tmp_path / "scores.sqlite")
    first = remote_reward(stub, llm, cache=cache)([group("a", TEXTS)]).values
    again = remote_reward(stub, llm, cache=cache)
    stub.bodies.clear()
    assert torch.equal(again([group("a", TEXTS)]).values, first)
    assert not stub.bodies
    other = make_tiny_llm(tmp_path / "other", chat=True, seed=1)
    with serve(other) as changed:
        with pytest.raises(RewardError, match=r"reward\.cache holds scores of another model"):
            remote_reward(changed, llm, cache=cache)
        remote_reward(changed, llm, cache=cache, version="second")
