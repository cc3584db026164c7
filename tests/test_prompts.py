"""Prompt templates: what the LLM reads, and which templates are refused."""

from __future__ import annotations

import pytest

from nemo_llm_feedback.errors import LLMError
from nemo_llm_feedback.prompts import BASE_TEMPLATE, CHAT_TEMPLATE, Template, read_template, template_faults
from nemo_llm_feedback.types import Context

BASE = Template(BASE_TEMPLATE)


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
    text = Template(CHAT_TEMPLATE).render(Context("a phone call", ("latte",)))
    assert "The recording is a phone call.\n" in text
    assert text.endswith("Reply with the transcript only.\n")
    assert Template(CHAT_TEMPLATE).render(Context()).startswith("Write down what is said")


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
    file.write_bytes(b"\xff\xfe{hypothesis}")
    with pytest.raises(LLMError, match="UTF-8"):
        read_template(str(file), chat=False)
    file.write_text("{description} {hypothesis}")
    with pytest.raises(LLMError, match=r"template\.txt.*line break"):
        read_template(str(file), chat=True)
    assert read_template(None, chat=True).text == CHAT_TEMPLATE
    assert read_template(None, chat=False).text == BASE_TEMPLATE
