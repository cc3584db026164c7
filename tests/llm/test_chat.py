"""Chat templates: rendered once, within bounds of time and memory, with the date of the run."""

from __future__ import annotations

import datetime
import resource
import string
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny_llm import make_tiny_llm
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import LLMScorer, chat
from nemo_llm_feedback.llm.encoding import PromptEncoder

COFFEE = Context("an order at a coffee shop", ("latte", "oat milk"))


def config(folder: Path, **settings) -> LLMConfig:
    return LLMConfig(model=str(folder), **{"quantization": "none", "device": "cpu", **settings})


def chat_llm(folder, template):
    """A tiny LLM whose chat template is another one."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_llm(folder, chat=True))
    tokenizer.chat_template = template.replace("CHATML", tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    return folder


def test_chat_template_that_rewrites_answers_is_refused(tmp_path):
    think = "{% if add_generation_prompt and reason is not defined %}<think>{% endif %}"
    folder = chat_llm(tmp_path, "CHATML" + think)
    with pytest.raises(LLMError, match="enable_thinking"):
        LLMScorer(config(folder))
    assert LLMScorer(config(folder, chat_template_kwargs={"reason": False})).encoder.uses_context
    assert LLMScorer(config(folder, chat="off")).encoder.end_id == 1


def test_a_model_that_can_think_is_not_asked_to(tmp_path):
    """An answer is a transcript; a template that thinks by default (Qwen3, SmolLM3) would have it thought about."""
    think = "{% if add_generation_prompt and enable_thinking is not defined %}<think>{% endif %}"
    folder = chat_llm(tmp_path, "CHATML" + think)
    scorer = LLMScorer(config(folder))
    given = LLMScorer(config(folder, chat_template_kwargs={"enable_thinking": False}))
    assert scorer.encoder.encode_prompt(COFFEE) == given.encoder.encode_prompt(COFFEE)


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %}GAP{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("gap", "marks", "lead"),
    [
        (" ", None, " "),  # byte-level: the space is a part of the first word's token
        (" ", "first", ""),  # the tokenizer writes it before every text by itself
        (" ", "always", ""),
        ("\n", None, ""),  # the prompt ends with it
    ],
)
def test_white_space_before_an_answer_is_where_the_template_has_it(gap, marks, lead, tmp_path):
    """Mistral's templates write a space before an answer: prompt and text are the tokens of the whole chat."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = chat_llm(tmp_path, MISTRAL.replace("GAP", gap))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if marks:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=marks)
        special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        letters = {"initial_alphabet": [*string.printable], "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, **letters)
        backend.train_from_iterator(["a large latte please", "milk and a transcript"] * 9, trainer)
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        marked = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
        marked.chat_template = tokenizer.chat_template
        tokenizer = marked
    encoder = PromptEncoder(tokenizer, config(folder), max_positions=512)
    for text in ("milk", "a large latte please"):
        chat = [{"role": "user", "content": encoder._template.render(COFFEE).strip()}]
        chat.append({"role": "assistant", "content": text})
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        expected = tuple(tokenizer(whole, add_special_tokens=False)["input_ids"])
        assert (*encoder.encode_prompt(COFFEE), *encoder.encode_text(text)) == expected
        ids, spans, shown = encoder.text_spans(text)
        assert ids == encoder.encode_text(text)
        assert shown == text
        assert spans[0][0] == 0
        assert spans[-1][1] == len(text)
    assert encoder._lead == lead
    # In the middle of a question a text has no such space, and an answer of the judge has it.
    (inside,) = encoder.encode_texts(["milk"], answer=False)
    assert inside == (*encoder.ids("milk"), encoder.end_id)
    after = encoder.frame("x")[1]
    ours, theirs = (
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (
            after + encoder.gap + "milk",
            tokenizer.apply_chat_template(
                [{"role": "user", "content": "x"}, {"role": "assistant", "content": "milk"}], tokenize=False
            ),
        )
    )
    assert ours == theirs[: len(ours)]
    assert encoder.encode_text("") == (encoder.end_id,)


def test_a_date_that_the_chat_template_writes_is_part_of_the_identity_and_stays_over_midnight(tmp_path, monkeypatch):
    folder = chat_llm(tmp_path, "{{ strftime_now('%d %b %Y, %H:%M') }}CHATML")
    days = iter(["2026-11-29", "2026-11-29", "2026-11-30", "2026-11-30"])
    clock = SimpleNamespace(today=lambda: datetime.date.fromisoformat(next(days)))
    monkeypatch.setattr(chat, "datetime", SimpleNamespace(date=clock, datetime=datetime.datetime))
    llm, same, later = (LLMScorer(config(folder)) for _ in range(3))
    assert llm.identity == same.identity != later.identity
    for scorer, day in ((llm, 29), (later, 30)):
        for context in (COFFEE, Context("another one")):  # the clock is not asked again
            prompt = scorer.encoder._tokenizer.decode(scorer.encoder.encode_prompt(context))
            assert prompt.startswith(f"{day} Nov 2026, 00:00<|im_start|>user\n")
    with chat.dated("2026-11-29"):  # as a resumed run begins
        assert LLMScorer(config(folder)).identity == llm.identity
    assert next(days) == "2026-11-30"


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("{{ raise_exception('no') }}", "TemplateError: no"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% for i in range(10**9) %}x{% endfor %}", "OverflowError: Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}CHATML", "takes more than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}xy{% endfor %}{% endfor %}", "takes more than"),
        ("{{ 10**(10**9) }}", "takes more than"),
        ("{{ 'a' * 10**11 }}", "takes more than"),
        ("{{ '%99999999999d' % 1 }}", "takes more than|OverflowError|ValueError"),
        ("{{ 'abc' * 10**6 }}CHATML", "writes more than 1048576 characters"),
        ("{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}", "RecursionError"),
        ("{{ 'a' | center(10**11) }}", "takes more than"),
        ("CHATML{{ messages[0]['content'] }}", "does not write the message once"),
        ("{{ messages | length }}", "does not write the message once"),
        ("{{ messages[0]['content'] | upper }}", "does not write the message once and as it is given"),
    ],
)
def test_a_chat_template_without_bounds_is_an_error_that_names_it(tmp_path, monkeypatch, broken, words):
    """A template is a program from outside: nested loops ran for ever, and a product of text ate all memory."""
    monkeypatch.setattr(chat, "_CPU_SECONDS", 1)
    folder = chat_llm(tmp_path, broken)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(LLMError, match=rf"chat template of {tmp_path}.*({words}).*llm\.chat=off"):
        LLMScorer(config(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 2**18  # KiB: not in this process


def test_chat_on_without_a_chat_template_is_refused(tmp_path):
    with pytest.raises(LLMError, match="chat=off"):
        LLMScorer(config(make_tiny_llm(tmp_path), chat="on"))
