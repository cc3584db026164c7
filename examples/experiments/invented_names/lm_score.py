"""Packs as tensors: several sentences behind one prompt in a single forward of a causal LM."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PREVIOUS_HEAD = (1, 2)  # (layer, head) taught to attend to the previous token
COPY_HEADS = ((2, 0), (3, 0), (3, 1))  # taught to attend to the listed token to copy


@dataclass(frozen=True)
class PackTensors:
    """One pack of S tokens, of which T are predicted.

    Attributes:
        input_ids: [1, S] the prompt, then each sentence without its `</s>`.
        position_ids: [1, S]; every sentence starts at the prompt's length.
        mask: [1, 1, S, S] additive float mask: a token sees the prompt and its own sentence up to itself.
        predictors: [T] index into S of the token whose output predicts target t.
        targets: [T] token ids; each sentence ends with `</s>`.
        owner: [T] index of the sentence that target t belongs to.
        copies: [C, 2] pairs (position that predicts a token of a listed term, position of that token in the list);
            the first token of a term has no pair, since nothing before it tells which term comes.
    """

    input_ids: Tensor
    position_ids: Tensor
    mask: Tensor
    predictors: Tensor
    targets: Tensor
    owner: Tensor
    copies: Tensor


def encode_pack(tokenizer: PreTrainedTokenizerBase, prompt: str, sentences: Sequence[str]) -> PackTensors:
    """Encode prompt and sentences separately (BPE must not merge across the border) and lay them out side by side.

    Args:
        tokenizer: has `<s>` as bos and `</s>` as eos.
        prompt: ends in a newline; "" for none.
        sentences: K sentences, none empty.
    """
    ids = [tokenizer.bos_token_id] + (tokenizer.encode(prompt, add_special_tokens=False) if prompt else [])
    num_prompt = len(ids)
    segment = [-1] * num_prompt
    position = list(range(num_prompt))
    sources = _bigrams(ids, tokenizer)
    predictors, targets, owner, copies = [], [], [], []
    for index, sentence in enumerate(sentences):
        tokens = tokenizer.encode(sentence, add_special_tokens=False)
        predictors += [num_prompt - 1, *range(len(ids), len(ids) + len(tokens))]
        targets += [*tokens, tokenizer.eos_token_id]
        owner += [index] * (len(tokens) + 1)
        for offset, bigram in enumerate(pairwise(tokens)):
            if bigram in sources:
                copies.append((len(ids) + offset, sources[bigram]))
        position += range(num_prompt, num_prompt + len(tokens))
        segment += [index] * len(tokens)
        ids += tokens
    parts = torch.tensor(segment)
    order = torch.arange(len(ids))
    visible = ((parts[None, :] == -1) | (parts[None, :] == parts[:, None])) & (order[None, :] <= order[:, None])
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    return PackTensors(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([position]),
        mask=mask[None, None],
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
        copies=torch.tensor(copies, dtype=torch.long).view(-1, 2),
    )


def _bigrams(prompt_ids: list[int], tokenizer: PreTrainedTokenizerBase) -> dict[tuple[int, int], int]:
    """(token, next token) → the next token's position in the term list; ambiguous pairs and borders are left out."""
    colon, space, comma = (tokenizer.convert_tokens_to_ids(token) for token in (":", "Ġ", ","))
    if colon not in prompt_ids:
        return {}
    first = prompt_ids.index(colon) + 2
    positions: dict[tuple[int, int], int] = {}
    ambiguous = set()
    for position in range(first, len(prompt_ids)):
        pair = (prompt_ids[position - 1], prompt_ids[position])
        if pair in positions or pair[0] in (space, comma) or pair[1] == comma:
            ambiguous.add(pair)
        positions[pair] = position
    return {pair: position for pair, position in positions.items() if pair not in ambiguous}


def token_log_prob(model: PreTrainedModel, pack: PackTensors) -> Tensor:
    """[T] natural-log probability of each target of the pack."""
    hidden = model.model(
        input_ids=pack.input_ids, position_ids=pack.position_ids, attention_mask=pack.mask, use_cache=False
    ).last_hidden_state[0]
    logits = model.lm_head(hidden[pack.predictors]).float()
    return logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]


def guided_loss(model: PreTrainedModel, pack: PackTensors, *, guide: float) -> tuple[Tensor, Tensor]:
    """The loss of a pack: mean −log p of the targets, plus `guide` times a loss on what some heads attend to.

    Copying needs two heads in a row: one that attends to the previous token, and a later one that finds the place in
    the list where the current token was the previous one. Gradient descent finds that pair late and all at once;
    teaching `PREVIOUS_HEAD` and `COPY_HEADS` where to attend (−log attention weight) finds it in a few dozen updates.

    Returns:
        (loss, [T] log-probabilities), both with gradient. The model must run eager attention when guide > 0.
    """
    output = model.model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        attention_mask=pack.mask,
        use_cache=False,
        output_attentions=guide > 0,
    )
    logits = model.lm_head(output.last_hidden_state[0, pack.predictors]).float()
    logp = logits.log_softmax(-1).gather(1, pack.targets[:, None])[:, 0]
    loss = -logp.mean()
    if guide > 0:
        layer, head = PREVIOUS_HEAD
        now = torch.arange(1, pack.input_ids.shape[1])
        before = now - 1
        starts = pack.position_ids[0, 1:] != pack.position_ids[0, :-1] + 1
        before[starts] = pack.predictors[0]
        loss = loss - guide * (output.attentions[layer][0, head, now, before] + 1e-6).log().mean()
        if len(pack.copies):
            here, there = pack.copies.T
            for layer, head in COPY_HEADS:
                weight = output.attentions[layer][0, head, here, there]
                loss = loss - guide / len(COPY_HEADS) * (weight + 1e-6).log().mean()
    return loss, logp


@torch.inference_mode()
def sentence_log_prob(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, sentences: Sequence[str]
) -> list[float]:
    """log p(sentence </s> | prompt) of each sentence, natural log."""
    pack = encode_pack(tokenizer, prompt, sentences)
    logp = token_log_prob(model, pack)
    return torch.zeros(len(sentences)).index_add_(0, pack.owner, logp).tolist()
