"""Prompt templates: what the LLM reads, and which templates are refused."""

from __future__ import annotations

import logging

import pytest
from helpers.tiny_llm import make_tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.data.manifests import merge_context, parse_context
from nemo_llm_feedback.llm.encoding import PromptEncoder
from nemo_llm_feedback.llm.prompts import (
    MARK,
    Template,
    read_template,
    template_faults,
)
from nemo_llm_feedback.rewards import score_key

BASE, CHAT = read_template(None, chat=False), read_template(None, chat=True)


def test_base_template_is_the_format_that_the_small_lm_was_trained_on():
    prompt = BASE.render(Context("an order at a coffee shop", ("latte", "flat white", "mocha")))
    assert prompt == (
        "The following is a transcript of an order at a coffee shop.\n"
        "Terms that may occur: latte, flat white, mocha.\n"
    )


def test_lines_with_nothing_to_fill_in_are_left_out():
    assert BASE.render(Context("a test")) == "The following is a transcript of a test.\n"
    assert BASE.render(Context(terms=("latte",))) == "Terms that may occur: latte.\n"
    assert BASE.render(Context()) == ""
    assert BASE.render(Context(" . ".strip(" "), (" ", ""))) == ""
    both = Template("{description}: {terms}\nAlways.\n{hypothesis}")
    assert both.render(Context("a test")) == "a test: \nAlways.\n"
    assert both.render(Context()) == "Always.\n"


def test_values_are_tidied_and_never_read_as_slots():
    prompt = BASE.render(Context("orders with {terms}.\n", ("two\nlines", "{hypothesis}", "{x}")))
    assert prompt == (
        "The following is a transcript of orders with {terms}.\nTerms that may occur: two lines, {hypothesis}, {x}.\n"
    )


def test_non_latin_contexts_are_kept_as_they_are():
    assert "咖啡店的点单.\nTerms that may occur: 拿铁, ラテ.\n" in BASE.render(
        Context("咖啡店的点单", ("拿铁", "ラテ"))
    )


def test_chat_template_ends_before_the_answer():
    text = CHAT.render(Context("a phone call", ("latte",)))
    assert "The recording is a phone call.\n" in text
    assert text.endswith("Reply with the transcript only.\n")
    assert CHAT.render(Context()).startswith("Write down what is said")


@pytest.mark.parametrize(
    "text",
    ["{hypothesis}", "Say:{hypothesis}", "{description}\n\n{hypothesis}\n", "{ } {hypothesis", "a {hypothesis}"],
)
def test_faults_of_templates(text):
    refused = text in ("{ } {hypothesis", "a {hypothesis}")
    assert bool(template_faults(text)) == refused


def test_uses_context():
    assert BASE.uses_context
    assert Template("{terms}\n{hypothesis}").uses_context
    assert not Template("An order at a coffee shop.\n{hypothesis}").uses_context


def test_files_are_read_and_checked(tmp_path):
    file = tmp_path / "template.txt"
    file.write_bytes("Gespräch über {description}.\r\n{hypothesis}\r\n".encode())
    assert read_template(str(file), chat=False).render(Context("Kaffee")) == "Gespräch über Kaffee.\n"
    file.write_bytes(b"Gespr\xe4ch {hypothesis}")
    with pytest.raises(LLMError, match="UTF-8"):
        read_template(str(file), chat=False)
    file.write_text("{description} {hypothesis}")
    with pytest.raises(LLMError, match=r"template\.txt.*line break"):
        read_template(str(file), chat=True)
    assert (
        BASE.text
        == "The following is a transcript of {description}.\nTerms that may occur: {terms}.\n{previous}\n{hypothesis}"
    )


# ---------------------------------------------------------------- previous utterances


def test_previous_utterances_stand_before_the_hypothesis_one_per_line():
    context = Context("a call", ("latte",), ("how can i\nhelp you", "", "i want {terms}"))
    assert BASE.render(context) == (
        "The following is a transcript of a call.\nTerms that may occur: latte.\nhow can i help you\ni want {terms}\n"
    )
    assert "Right before, this was said: how can i help you\ni want {terms}\n" in CHAT.render(context)
    assert BASE.render(Context(previous=("喂，你好",))) == "喂，你好\n"
    assert Template("{previous}\n{hypothesis}").uses_context
    assert Context(previous=("hello",))


def test_contexts_of_manifests_may_be_objects():
    context = parse_context({"description": " a call ", "terms": ["latte", "latte"], "previous": ["hello ", ""]})
    assert context == Context("a call", ("latte",), ("hello",))
    assert parse_context({"previous": None}) == Context()
    run = Context("orders", ("tea",), ("welcome",))
    assert merge_context(run, context) == Context("a call", ("latte", "tea"), ("hello",))
    assert merge_context(run, Context()) == run
    for wrong in ({"text": "x"}, {"previous": "x"}, {"description": ["x"]}, {"terms": "x"}, {"previous": [1]}, 3):
        with pytest.raises(ValueError, match="context"):
            parse_context(wrong)


def test_previous_utterances_change_the_key_of_a_score_and_only_theirs():
    keys = {score_key("s", Context("a", ("b",), previous), "t") for previous in ((), ("x",), ("x", "y"), ("y", "x"))}
    assert len(keys) == 4
    # As it was before contexts could hold earlier utterances: stores of earlier versions stay good.
    old = "7ed8c214be9d160acf49cd00ae87247e7b9dccf1d24316f897fd2265830f5dea"
    assert score_key("s", Context("a", ("b",)), "t") == old


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True)


def encoder(tokenizer, max_tokens: int) -> PromptEncoder:
    return PromptEncoder(tokenizer, LLMConfig("m", chat="off", max_context_tokens=max_tokens), max_positions=2**20)


def test_long_contexts_lose_terms_then_the_oldest_utterances_then_words(tokenizer, caplog):
    previous = tuple(f"he read paper number {n} in the morning" for n in range(8))
    context = Context("a coffee shop order", tuple(f"latte {n}" for n in range(20)), previous)
    whole = len(encoder(tokenizer, 10_000).encode_prompt(context))
    shown = {
        limit: tokenizer.decode(encoder(tokenizer, limit).encode_prompt(context)) for limit in (whole - 10, 80, 30)
    }
    assert "latte 0" in shown[whole - 10]
    assert "latte 19" not in shown[whole - 10]
    assert "number 0" in shown[whole - 10]
    assert "latte" not in shown[80]
    assert "number 7" in shown[80]
    assert "number 0" not in shown[80]
    assert "coffee shop order" in shown[80]
    assert "number" not in shown[30]
    assert "a coffee" in shown[30]
    with caplog.at_level(logging.WARNING):
        encoder(tokenizer, 80).encode_prompt(context)
    assert "0 of its 20 terms" in caplog.text
    assert "llm.max_terms" in caplog.text


def test_control_tokens_in_previous_utterances_stay_text(tokenizer):
    ids = encoder(tokenizer, 500).encode_prompt(Context("x", (), ("hello <|im_end|>", "<tool_call>")))
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<tool_call>"]))


# ---------------------------------------------------------------- questions and lists


@pytest.mark.parametrize("use", ["score", "yes_no", "rating", "correction"])
@pytest.mark.parametrize("chat", [False, True])
def test_built_in_templates_are_valid_and_show_the_whole_context(use, chat):
    template = read_template(None, chat=chat, use=use)
    context = Context("a call", ("拿铁",), ("hello",))
    if template.kind == "score":
        text = template.render(context)
    elif template.kind == "judge":
        text = template.render_question(context)
        assert text.count(MARK) == 1
    else:
        text = template.render_list(context, ["a\nlatte", "我要拿铁", "{terms}"])
        assert "\n1. a latte\n2. 我要拿铁\n3. {terms}\n" in text
    for part in ("a call", "拿铁", "hello"):
        assert part in text
    if template.kind != "score":
        assert text == text.rstrip()
        assert not text.endswith(MARK)


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("{hypothesis}\n", "judge", "put the question after"),
        ("Is {hypothesis} right?", "judge", "space before"),
        ("Right?", "judge", "0 {hypothesis} slots"),
        ("{hypotheses}\nWhat was said:", "judge", "unknown slot {hypotheses}"),
        ("{hypothesis}\nWhat was said:", "correction", "did you mean {hypotheses}"),
        ("{hypotheses}", "correction", "put the question after"),
        ("Guesses: {hypotheses}\nSaid:", "correction", ""),
        ("Text:\n{hypothesis}\nRight?", "judge", ""),
    ],
)
def test_faults_of_questions(text, kind, words):
    faults = template_faults(text, kind=kind)
    assert (words in " ".join(faults)) if words else faults == []


def test_a_question_keeps_its_one_mark_whatever_the_context_holds():
    template = read_template(None, chat=True, use="yes_no")
    assert template.render_question(Context("\ue000", ("\ue000{hypothesis}",))).count("\ue000") == 1


# ---------------------------------------------------------------- tokenizers with a mark before the first word

ZEPHYR = (
    "{% for m in messages %}"
    "{{ ('<|user|>\n' if m['role'] == 'user' else '<|assistant|>\n') + m['content'] + eos_token }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)


def sentencepiece(template: str | None) -> LlamaTokenizer:
    """A Llama-2 tokenizer, which puts a mark before the first word of whatever it is given."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    merges = []
    for char in "▁abcdefghijklmnopqrstuvwxyz.,:<|>[]/":
        vocab.setdefault(char, len(vocab))
    for word in ("▁latte", "latte", "▁mocha", "▁transcript", "transcript"):
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            merges += [pair] if pair not in merges else []
            vocab.setdefault(word[:end], len(vocab))
    made = LlamaTokenizer(vocab=vocab, merges=merges)
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", [None, ZEPHYR], ids=["base", "chat"])
def test_the_first_word_behind_a_line_break_has_no_space_before_it(template):
    """TinyLlama-Chat, Zephyr, and Llama-2 and Mistral bases: `<0x0A>`, `latte` and not `<0x0A>`, `▁latte`."""
    tokenizer = sentencepiece(template)
    encoder = PromptEncoder(tokenizer, LLMConfig(model="x"), max_positions=512)
    ids = [*encoder.encode_prompt(Context("a test")), *encoder.encode_text("latte mocha")]
    assert tokenizer.convert_ids_to_tokens(ids)[-4:] == ["<0x0A>", "latte", "▁mocha", "</s>"]
    if template:
        chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "latte mocha"}]
        assert tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)[-4:] == ids[-4:]
    spanned, spans, shown = encoder.text_spans("latte mocha")
    assert list(spanned) == ids[-3:]
    assert [shown[start:end].strip() for start, end in spans] == ["latte", "mocha"]
    assert encoder.encode_text("") == (tokenizer.eos_token_id,)
    assert tokenizer.convert_ids_to_tokens(encoder.encode_texts(["latte"], answer=False)[0]) == ["▁latte", "</s>"]


def test_a_character_that_the_tokenizer_lacks_is_lost_alone():
    """It is no control token, whose text is broken up into letters."""
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁latte", -1.0), ("▁caf", -1.0), ("▁", -9.0)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>", eos_token="</s>")
    encoder = PromptEncoder(tokenizer, LLMConfig(model="x"), max_positions=512)
    assert tokenizer.convert_ids_to_tokens(encoder.encode_text("café latte")) == ["▁caf", "<unk>", "▁latte", "</s>"]
    assert encoder.shorten(Context("a café"), lambda _: 0) == Context("a café")
    assert encoder.shorten(Context("a <unk> b"), lambda _: 0) == Context("a < unk> b")
    assert tokenizer.unk_token not in encoder.safe_text("x <unk>")
