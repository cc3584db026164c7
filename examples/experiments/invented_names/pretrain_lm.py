r"""Trains a small causal LM from random weights on plain sentences, where the start of train_lm.py shall not be the
shared LM: that one has read coffee orders.

    python examples/experiments/invented_names/pretrain_lm.py --no-coffee --out plain
    python examples/experiments/invented_names/train_lm.py --start plain --no-coffee --updates 700 \
        --work work/lm_plain --out lm_plain

Layout and tokenizer are those of ../shared/checkpoints/lm, whose pieces are all that is left of the text it was made
of. It resumes from --work.
"""

import argparse
import random
import time
from pathlib import Path

import torch
from lm_data import WEIGHTS, read_texts
from on_demand import SHARED, WORK
from train_lm import HELD_OUT, learning_rate
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SEED = 5


def padded(tokenizer: PreTrainedTokenizerBase, sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """([B, S] `<s>` and the tokens, [B, S] the next tokens with `</s>` at the end; −100 where there is none)."""
    rows = [tokenizer.encode(sentence, add_special_tokens=False) for sentence in sentences]
    length = 1 + max(map(len, rows))
    inputs = torch.full((len(rows), length), tokenizer.eos_token_id)
    targets = torch.full((len(rows), length), -100)
    for b, row in enumerate(rows):
        inputs[b, : len(row) + 1] = torch.tensor([tokenizer.bos_token_id, *row])
        targets[b, : len(row) + 1] = torch.tensor([*row, tokenizer.eos_token_id])
    return inputs, targets


def mean_loss(model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Nats per token; padding stands behind each sentence, so that the causal mask alone keeps it out."""
    logits = model(input_ids=inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def main() -> None:
    """Trains, reports nats per token on held-out sentences, and writes the model in fp32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with text/")
    parser.add_argument("--layout", type=Path, default=SHARED.parent / "checkpoints" / "lm", help="config, tokenizer")
    parser.add_argument("--no-coffee", action="store_true", help="read no text about coffee")
    parser.add_argument("--work", type=Path, default=WORK / "lm_pretrained")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64, help="sentences an update")
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    texts = read_texts(args.shared / "text", coffee=not args.no_coffee)
    held_out = {name: lines[:HELD_OUT] for name, lines in texts.items()}
    texts = {name: lines[HELD_OUT:] for name, lines in texts.items()}
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(args.layout)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.layout)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.1)
    last, first = args.work / "last.pt", 0
    if last.exists():
        state = torch.load(last, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["update"]
    start, losses = time.time(), 0.0
    for update in range(first, args.updates):
        rng = random.Random(f"{SEED}/{update}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(update / args.updates, args.lr)
        names = rng.choices(list(texts), weights=[WEIGHTS[name] for name in texts], k=args.batch)
        loss = mean_loss(model, *padded(tokenizer, [rng.choice(texts[name]) for name in names]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses += loss.item()
        if (update + 1) % 50 == 0:
            print(f"update {update + 1}: {losses / 50:.3f} nat/token, {time.time() - start:.0f} s", flush=True)
            losses = 0.0
            args.work.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "update": update + 1}
            torch.save(state, last.with_suffix(".part"))
            last.with_suffix(".part").rename(last)
    model.eval()
    with torch.inference_mode():
        found = {name: mean_loss(model, *padded(tokenizer, lines)).item() for name, lines in held_out.items()}
    print("held out, nat/token:", {name: round(value, 3) for name, value in found.items()}, flush=True)
    model.save_pretrained(args.out, safe_serialization=True)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
