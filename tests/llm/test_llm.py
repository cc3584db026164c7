"""The scoring LLM: scores equal those of plain forwards, however it is stored, prompted or short of memory."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny_llm import ARCHITECTURES, make_tiny_llm, train_tiny_llm

from nemo_llm_feedback.core.config import LLMConfig
from nemo_llm_feedback.core.errors import LLMError
from nemo_llm_feedback.core.types import Context
from nemo_llm_feedback.llm import encoding, load_llm, open_llm
from nemo_llm_feedback.llm import scorer as scorer_module

SHARED_LM = Path(__file__).parents[3] / "shared" / "checkpoints" / "lm"
COFFEE = Context("an order at a coffee shop where one says more than eight tokens", ("latte", "oat milk"))
HOME = Context("a voice command to an assistant")
TEXTS = ["can i have a large latte", "can i have a large lattey please", "", "can i", "turn on the light", "milk"]


def config(folder: Path | str, **settings) -> LLMConfig:
    return LLMConfig(model=str(folder), **{"quantization": "none", "device": "cpu", **settings})


def naive(scorer, context: Context, text: str) -> float:
    """log p(text | context) by one plain forward and an explicit loop over the text's tokens."""
    prompt, ids = scorer.encoder.encode_prompt(context), scorer.encoder.encode_text(text)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # one line per layer with int8
    with torch.no_grad():
        logits = scorer.model(torch.tensor([prompt + ids])).logits[0].double()
    logp = logits.log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(ids))


def flat(scores) -> list[float]:
    return [score.logp for row in scores for score in row]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_tiny_llm(tmp_path_factory.mktemp("llm") / "llama")


@pytest.fixture(scope="module", params=["made here", "shared"])
def trained(request, tmp_path_factory) -> Path:
    """An LLM whose probabilities are far from uniform for what it has read."""
    if request.param == "made here":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.05}  # blocks of nf4 are 64 wide
        return train_tiny_llm(make_tiny_llm(tmp_path_factory.mktemp("llm") / "trained", **sizes))
    if not SHARED_LM.is_dir():
        pytest.skip("the shared LM is not beside this checkout")
    return SHARED_LM


@pytest.fixture(scope="module")
def scorer(llama):
    return load_llm(config(llama))


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_one_by_one_scoring(architecture, tmp_path):
    llm = load_llm(config(make_tiny_llm(tmp_path, architecture=architecture)))
    assert llm.engine.sharing.name == ("NONE" if architecture == "mamba" else "TRIE")
    requests = [(COFFEE, TEXTS), (HOME, TEXTS[2:]), (Context(), TEXTS[:2]), (COFFEE, TEXTS[1:3])]
    expected = [naive(llm, context, text) for context, texts in requests for text in texts]
    assert flat(llm.score(requests)) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 1.0  # the scores differ enough for the comparison to mean something


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_nf4_on_cpu_is_packed_and_scores_equal_naive_scoring(architecture, tmp_path):
    from bitsandbytes.nn import Linear4bit

    llm = load_llm(config(make_tiny_llm(tmp_path, architecture=architecture), quantization="nf4"))
    blocks = [m for n, m in llm.model.named_modules() if "layers.0." in n or ".h.0." in n]
    layers = [m for m in blocks if isinstance(m, Linear4bit)]
    matrices = [m for m in blocks if getattr(m, "weight", None) is not None and "norm" not in type(m).__name__.lower()]
    assert layers
    assert layers == matrices
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == torch.float32
    expected = [naive(llm, COFFEE, text) for text in TEXTS]
    assert flat(llm.score([(COFFEE, TEXTS)])) == pytest.approx(expected, abs=1e-4)


def test_a_cpu_with_bfloat16_instructions_computes_in_the_dtype_that_was_asked_for(llama, monkeypatch):
    """bitsandbytes takes its bfloat16 kernel there whatever the compute dtype, 0.002 nat per token off (issue 8)."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_llm(config(llama, quantization="nf4", compute_dtype="float32")).model
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert layers
    for layer in layers:
        x = torch.randn(3, layer.in_features)
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        with torch.no_grad():
            assert torch.allclose(layer(x), torch.nn.functional.linear(x, weight.float()), atol=1e-5)
        assert not layer.support_avx512bf16_for_cpu


def test_auto_computes_in_bfloat16_where_the_cpu_has_it_and_says_so(trained, monkeypatch, caplog):
    texts = [*TEXTS, "can i have an iced latte", "can i have an ice later"]
    exact = flat(load_llm(config(trained, quantization="nf4")).score([(COFFEE, texts)]))
    monkeypatch.setattr("nemo_llm_feedback.llm.loading._has_fast_bfloat16", lambda: True)
    llm = load_llm(config(trained, quantization="nf4"))
    assert ":nf4:bfloat16:" in llm.identity
    assert "computing in torch.bfloat16, as this CPU has AVX512-BF16" in caplog.text
    assert {m.compute_dtype for m in llm.model.modules() if type(m).__name__ == "Linear4bit"} == {torch.bfloat16}
    assert llm.model.get_input_embeddings().weight.dtype == torch.float32
    errors = torch.tensor(flat(llm.score([(COFFEE, texts)]))) - torch.tensor(exact)
    assert 0 < errors.std() < 0.05 * torch.tensor(exact).std()
    assert ":int8:float32:" in open_llm(config(trained, quantization="int8")).identity
    assert load_llm(config(trained)).model.dtype == torch.bfloat16


def test_layers_that_the_bfloat16_kernel_does_not_take_compute_without_it(llama):
    """It wants multiples of 32 and 64, and failed with a raw error on others."""
    llm = load_llm(config(llama, quantization="nf4", compute_dtype="bfloat16"))
    expected = [naive(llm, COFFEE, text) for text in TEXTS]
    assert flat(llm.score([(COFFEE, TEXTS)])) == pytest.approx(expected, abs=0.25)


def test_int8_on_cpu_is_packed_and_scores_equal_naive_scoring(llama):
    from bitsandbytes.nn import Linear8bitLt

    llm = load_llm(config(llama, quantization="int8"))
    layer = llm.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Linear8bitLt)
    assert layer.weight.dtype == torch.int8
    expected = [naive(llm, COFFEE, text) for text in TEXTS]
    # Its layers round activations to 8 bits, which turns a rounding error of 1e-7 into one of 1/127 now and then.
    assert flat(llm.score([(COFFEE, TEXTS)])) == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize(
    ("quantization", "dtype", "tolerance"),
    [
        ("none", "float32", 1e-4),
        ("nf4", "float32", 1e-4),
        ("int8", "float32", 0.5),
        ("none", "bfloat16", 0.25),
        ("nf4", "bfloat16", 0.25),
    ],
)
def test_the_stated_tolerances_hold_for_a_trained_llm(trained, quantization, dtype, tolerance):
    """The table of docs/rewards.md."""
    terms = ("iced latte", "oat milk", "cappuccino", "mocha", "espresso", "soy milk", "flat white", "large")
    rows = ["can i have a large iced latte with oat milk", "one more cappuccino and then turn the light on"]
    groups = [[text, text.rsplit(" ", 1)[0], f"{text} please", text.replace("e", "i")] for text in rows]
    llm = load_llm(config(trained, quantization=quantization, compute_dtype=dtype))
    context = Context("an order at a coffee shop", terms)
    got = flat(llm.score([(context, group) for group in groups]))
    prompt = llm.encoder.encode_prompt(context)
    plain = [llm.engine.plain_score(prompt, llm.encoder.encode_text(text)) for group in groups for text in group]
    assert llm.engine.sharing.name == "TRIE"
    assert f":{quantization}:{dtype}:" in llm.identity
    assert got == pytest.approx(plain, abs=tolerance)
    assert max(got[:4]) - min(got[:4]) > 10  # a group's sums are as far apart as those of docs/rewards.md


def test_order_company_and_budget_do_not_matter(llama, scorer):
    whole = scorer.score([(COFFEE, TEXTS), (HOME, TEXTS)])
    turned = scorer.score([(HOME, TEXTS[::-1]), (COFFEE, TEXTS[::-1])])
    alone = [[scorer.score([(c, [t])])[0][0] for t in TEXTS] for c in (COFFEE, HOME)]
    small = load_llm(config(llama, token_budget=1)).score([(COFFEE, TEXTS), (HOME, TEXTS)])
    assert flat(whole) == pytest.approx(flat(row[::-1] for row in turned[::-1]), abs=1e-4)
    assert flat(whole) == pytest.approx(flat(alone), abs=1e-4)
    assert flat(whole) == pytest.approx(flat(small), abs=1e-4)


def test_context_and_end_of_text_matter(scorer):
    (with_terms,), (without,), (short,) = scorer.score([(COFFEE, ["latte"]), (HOME, ["latte"]), (COFFEE, ["la"])])
    assert abs(with_terms.logp - without.logp) > 1e-3
    assert with_terms.num_tokens == len(scorer.encoder.encode_text("latte"))
    assert scorer.encoder.encode_text("latte")[-1] == scorer.encoder.end_id == 1
    empty = scorer.score([(COFFEE, [""])])[0][0]
    assert empty.num_tokens == 1
    assert empty.logp < 0  # the end token's probability, not an empty sum
    assert short.logp != with_terms.logp


def test_equal_texts_and_contexts_run_once(llama):
    llm = load_llm(config(llama))
    llm.score([(COFFEE, ["can i have a latte"])])
    before = llm.engine.tokens_run
    llm.score([(COFFEE, ["can i have a latte"])])
    one = llm.engine.tokens_run - before
    before = llm.engine.tokens_run
    scores = llm.score([(COFFEE, ["can i have a latte"] * 3), (COFFEE, ["can i have a latte"])])
    assert llm.engine.tokens_run - before == one < len(llm.encoder.encode_prompt(COFFEE))
    assert len(set(flat(scores))) == 1
    assert list(map(len, scores)) == [3, 1]


def test_leaves_random_state_grad_mode_and_autocast_alone(llama):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    llm = load_llm(config(llama))
    plain = flat(llm.score([(COFFEE, TEXTS)]))
    assert torch.equal(torch.rand(3), expected)
    assert torch.is_grad_enabled()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flat(llm.score([(COFFEE, TEXTS)])) == plain
        assert torch.is_autocast_enabled("cpu")
    assert not any(p.requires_grad for p in llm.model.parameters())
    assert not llm.model.training


def test_out_of_memory_halves_the_batch_and_keeps_the_scores(llama, scorer, monkeypatch, caplog):
    llm = load_llm(config(llama))
    expected = flat(scorer.score([(COFFEE, TEXTS)]))
    run = llm.engine._hidden
    failures = 0

    def fails_on_wide(cache, **inputs):
        nonlocal failures
        if inputs["attention_mask"].dim() == 4 and inputs["input_ids"].numel() > 9:  # tries, not single sequences
            failures += 1
            raise torch.OutOfMemoryError("out of memory")
        return run(cache, **inputs)

    monkeypatch.setattr(llm.engine, "_hidden", fails_on_wide)
    with caplog.at_level(logging.WARNING):
        assert flat(llm.score([(COFFEE, TEXTS)])) == pytest.approx(expected, abs=1e-4)
    assert failures > 0
    assert "token_budget" in caplog.text
    assert llm.engine.token_budget < 8192


def test_out_of_memory_with_one_text_names_the_fix(llama, monkeypatch):
    llm = load_llm(config(llama))

    def fails(*args, **inputs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr(llm.engine, "_hidden", fails)
    with pytest.raises(LLMError, match="max_context_tokens"):
        llm.score([(COFFEE, TEXTS)])


def test_old_prompts_make_room(llama, monkeypatch):
    from nemo_llm_feedback.llm import engine

    monkeypatch.setattr(engine, "_PREFIX_BYTES", 1)
    llm = load_llm(config(llama))
    contexts = [Context(f"number {n}") for n in range(4)]
    scores = flat(llm.score([(c, ["a latte"]) for c in contexts]))
    assert len(llm.engine._prefixes) == 1
    assert llm.memory_bytes == llm.model.get_memory_footprint() + llm.engine._prefixes.num_bytes
    assert scores == pytest.approx([naive(llm, c, "a latte") for c in contexts], abs=1e-4)


# ---------------------------------------------------------------- prompts and tokens


def test_control_tokens_in_untrusted_text_stay_text(tmp_path):
    llm = load_llm(config(make_tiny_llm(tmp_path, chat=True)))
    encoder = llm.encoder
    controls = {0, 1, 2, *(encoder._tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<tool_call>"))}
    for text in ("a </s> b", "<|im_end|>\n<|im_start|>user", "<tool_call>", "</s></s>", "<s<s>>", "<S>"):
        assert not controls & set(encoder.encode_text(text)[:-1]), text
        assert len(encoder.encode_text(text)) > 2
        plain = [i for i in encoder.encode_prompt(Context("x", ("y",))) if i in controls]
        hostile = [i for i in encoder.encode_prompt(Context(text, (text,))) if i in controls]
        assert plain == hostile
        assert math.isfinite(llm.score([(Context(text, (text,)), [text])])[0][0].logp)


def test_a_text_is_tokenized_once_whatever_it_stands_behind(llama, monkeypatch):
    scorer = open_llm(config(llama))
    asked: list[str] = []
    kind, ids = type(scorer.encoder._tokenizer), scorer.encoder.ids
    plain = kind.__call__

    def counted(tokenizer, texts, **options):
        asked.extend([texts] if isinstance(texts, str) else texts)
        return plain(tokenizer, texts, **options)

    monkeypatch.setattr(kind, "__call__", counted)
    first = [*scorer.encoder.encode_texts((*TEXTS, *TEXTS)), *map(scorer.encoder.encode_text, TEXTS)]
    assert sorted(asked) == sorted(TEXTS)
    assert first == [(*ids(text), scorer.encoder.end_id) for text in (*TEXTS, *TEXTS, *TEXTS)]
    asked.clear()
    scorer.score([(COFFEE, TEXTS), (HOME, TEXTS)])
    assert not set(asked) & {text for text in TEXTS if text}


def test_no_more_texts_are_kept_than_memory_allows(llama, monkeypatch):
    monkeypatch.setattr(encoding, "_CACHED_TEXTS", 3)
    encoder = open_llm(config(llama)).encoder
    for text in ("a", "b", "c", "d", "a"):
        assert encoder.encode_text(text) == (*encoder.ids(text), encoder.end_id)
        assert len(encoder._texts) <= 3
    assert len(encoder.encode_texts(["x", "y", "z", "latte"])) == 4


def test_control_tokens_of_the_template_itself_are_kept(tmp_path):
    template = tmp_path / "t.txt"
    template.write_text("<|im_start|>{description}<|im_end|>\n{hypothesis}")
    folder = make_tiny_llm(tmp_path / "llm", chat=True)
    llm = load_llm(config(folder, template=str(template), chat="off"))
    ids = llm.encoder.encode_prompt(Context("coffee"))
    special = llm.encoder._tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert ids[:2] == (0, special[0])
    assert special[1] in ids
    assert llm.encoder.end_id == 1


def test_chat_template_puts_the_hypothesis_where_the_answer_stands(tmp_path):
    llm = load_llm(config(make_tiny_llm(tmp_path, chat=True)))
    tokenizer = llm.encoder._tokenizer
    prompt = tokenizer.decode(llm.encoder.encode_prompt(COFFEE))
    assert prompt.startswith("<|im_start|>user\n")
    assert "latte, oat milk" in prompt
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert llm.encoder.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert flat(llm.score([(COFFEE, TEXTS)])) == pytest.approx([naive(llm, COFFEE, t) for t in TEXTS], abs=1e-4)


def test_tokenizer_without_begin_token_scores_the_empty_prompt(tmp_path):
    llm = load_llm(config(make_tiny_llm(tmp_path, bos=False)))
    assert llm.encoder.encode_prompt(Context()) == (1,)
    assert llm.encoder.encode_prompt(HOME)[0] != 1
    assert flat(llm.score([(Context(), TEXTS)])) == pytest.approx([naive(llm, Context(), t) for t in TEXTS], abs=1e-4)


def test_long_contexts_lose_terms_first_and_warn_once(llama, caplog):
    llm = load_llm(config(llama, max_context_tokens=64))
    terms = tuple(f"latte number {n}" for n in range(50))
    with caplog.at_level(logging.WARNING):
        ids = llm.encoder.encode_prompt(Context("an order at a coffee shop", terms))
        llm.encoder.encode_prompt(Context("another order", terms))
    text = llm.encoder._tokenizer.decode(ids)
    assert 50 < len(ids) <= 64
    assert text.startswith("<s>The following is a transcript of an order at a coffee shop.\n")
    assert "latte number 0, latte number 1" in text
    assert text.endswith(".\n")
    assert "number 49" not in text
    assert llm.encoder.num_truncated == 2
    assert sum("longer than 64 tokens" in record.message for record in caplog.records) == 1


def test_long_descriptions_lose_words_and_too_small_limits_are_refused(llama, tmp_path):
    llm = load_llm(config(llama, max_context_tokens=40))
    ids = llm.encoder.encode_prompt(Context("milk " * 200, ("latte",)))
    assert 30 < len(ids) <= 40
    assert llm.encoder._tokenizer.decode(ids).endswith("milk.\n")
    template = tmp_path / "t.txt"
    template.write_text("milk " * 50 + "\n{description}\n{hypothesis}")
    with pytest.raises(LLMError, match="max_context_tokens"):
        load_llm(config(llama, max_context_tokens=40, template=str(template)))


def test_prompts_leave_room_and_texts_that_do_not_fit_are_nan(tmp_path, caplog):
    llm = load_llm(config(make_tiny_llm(tmp_path, max_position_embeddings=64), max_context_tokens=10_000))
    long_context = Context("a test", tuple(f"term {n}" for n in range(100)))
    assert len(llm.encoder.encode_prompt(long_context)) <= 48
    with caplog.at_level(logging.WARNING):
        short, long = llm.score([(long_context, ["a latte", "latte " * 80])])[0]
    assert math.isfinite(short.logp)
    assert math.isnan(long.logp)
    assert "longer than the LLM can read" in caplog.text


# ---------------------------------------------------------------- the shared LM


@pytest.mark.skipif(not SHARED_LM.is_dir(), reason="the shared LM is not beside this checkout")
def test_shared_lm_prefers_its_domain():
    llm = load_llm(config(SHARED_LM, quantization="nf4"))
    order = "can i have a large latte please"
    coffee, other = Context("an order at a coffee shop"), Context("a recording of read speech")
    in_domain, out_of_domain, garbled = flat(llm.score([(coffee, [order]), (other, [order]), (coffee, ["kan i haf"])]))
    assert in_domain > out_of_domain > garbled
    prompt = llm.encoder.encode_prompt(Context("an order at a coffee shop", ("latte", "mocha")))
    text = "<s>The following is a transcript of an order at a coffee shop.\nTerms that may occur: latte, mocha.\n"
    assert llm.encoder._tokenizer.decode(prompt) == text
    assert llm.encoder.encode_prompt(Context()) == (0,)


# ---------------------------------------------------------------- the start-up check


def test_a_model_that_disagrees_with_its_plain_forward_is_refused(llama, monkeypatch):
    from nemo_llm_feedback.llm.engine import Engine

    plain = Engine.plain_score
    monkeypatch.setattr(Engine, "plain_score", lambda self, *args: plain(self, *args) + 0.1)
    with pytest.raises(LLMError, match="start-up check"):
        load_llm(config(llama))


def test_an_llm_that_does_not_take_tries_goes_on_without(llama, monkeypatch):
    from nemo_llm_feedback.llm.packing import PackedBatch

    def unmasked(self, dtype, device):
        return torch.zeros(len(self.real), 1, self.real.shape[1], int(self._prompt_lens.max()) + self.real.shape[1])

    monkeypatch.setattr(PackedBatch, "trie_mask", unmasked)
    warnings: list[str] = []
    monkeypatch.setattr(scorer_module.logger, "warning", lambda message, *values: warnings.append(message % values))
    llm = load_llm(config(llama))
    assert llm.engine.sharing.name == "PROMPT"
    assert any("trie-shaped" in message for message in warnings)
    assert flat(llm.score([(COFFEE, TEXTS)])) == pytest.approx([naive(llm, COFFEE, t) for t in TEXTS], abs=1e-4)


def test_a_window_that_the_config_does_not_declare_is_noticed_when_rows_grow_beyond_it(tmp_path, monkeypatch):
    """GPT-Neo's local layers count keys, not positions: right in a short check, wrong in long packed rows."""
    import transformers

    folder = make_tiny_llm(tmp_path)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 64, "initializer_range": 0.3}
    settings = transformers.GPTNeoConfig(
        **sizes,
        vocab_size=400,
        window_size=80,
        attention_types=[[["global", "local"], 1]],
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
    warnings: list[str] = []
    monkeypatch.setattr(scorer_module.logger, "warning", lambda message, *values: warnings.append(message % values))
    llm = load_llm(config(folder))
    assert llm.engine.sharing.name == "TRIE"
    texts = [f"{text} and some words {n}" for n in range(3) for text in TEXTS]
    assert flat(llm.score([(COFFEE, texts)])) == pytest.approx([naive(llm, COFFEE, t) for t in texts], abs=1e-3)
    assert llm.engine.sharing.name == "PROMPT"
    assert warnings == [
        "Long rows score differently in a plain forward: from now on hypotheses share their prompt only."
    ]


def test_longer_rows_are_compared_with_a_plain_forward_once(llama, monkeypatch):
    llm = load_llm(config(llama))
    plain, calls = llm.engine.plain_score, []
    monkeypatch.setattr(llm.engine, "plain_score", lambda *args: calls.append(args) or plain(*args))
    llm.score([(HOME, ["milk"])])
    assert not calls  # shorter than the start-up check's
    llm.score([(HOME, ["milk"]), (COFFEE, TEXTS)])
    assert {prompt for prompt, _ in calls} == {llm.encoder.encode_prompt(COFFEE)}
    before = len(calls)
    llm.score([(COFFEE, [text + " a" for text in TEXTS[1:]])])
    assert len(calls) == before
    longest = Context("word " * 60)
    assert math.isnan(flat(llm.score([(longest, ["latte " * 400]), (HOME, ["milk"])]))[0])  # nothing to compare there
    assert len(calls) == before


def test_weights_that_are_not_finite_are_refused(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(llama, tmp_path / "llm"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LLMError, match="start-up check"):
        load_llm(config(folder))
