"""Trains a small causal LM, so that a term listed in the prompt becomes likely, even one never seen before.

It starts from ../shared/checkpoints/lm and keeps that model's prompt format; `lm_data.py` says what an example is.
The text is ../shared/data/text without reserved_* and barista_written_orders; no invented word resembles a term
of the hospital.

    python examples/experiments/invented_names/train_lm.py --minutes 25     # trains and resumes, then writes lm/
    python examples/experiments/invented_names/train_lm.py --evaluate-only  # what a listed term gains, on unseen terms
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from lm_data import PackMaker, make_prompt, read_texts
from lm_score import encode_pack, guided_loss, sentence_log_prob
from make_data import training_sentences
from on_demand import HERE, SHARED, WORK
from rapidfuzz.distance import Levenshtein
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SEED = 11
DRILL_UNTIL = 0.15  # the first part of training is mostly bare lists
GUIDE_UNTIL = 0.6  # attention is guided less and less until here, see lm_score.guided_loss
HELD_OUT = 200  # sentences of each text kept out of training, for the report
RESPELLINGS = (
    ("ph", "f"), ("ck", "k"), ("qu", "kw"), ("x", "cks"), ("ee", "ea"), ("ai", "ay"), ("ou", "ow"), ("tion", "shun"),
    ("ine", "een"), ("ane", "ain"), ("ll", "l"), ("c", "k"), ("z", "s"), ("er", "ar"), ("en", "in"), ("i", "e"),
    ("o", "a"), ("v", "f"), ("d", "t"), ("e", "i"), ("a", "o"), ("s", "c"), ("k", "c"), ("t", "d"), ("u", "o"),
)  # fmt: skip


def domain_words(terms_file: Path, shared: Path) -> list[str]:
    """Words of the hospital's terms that no training text has: nothing invented here may resemble them."""
    known = {word for sentence in training_sentences(shared) for word in sentence.split()}
    return sorted(set(terms_file.read_text().split()) - known)


def respell(term: str, rng: random.Random) -> str:
    """A plausible misspelling by sound: respelled until two letters differ, sometimes with a word break."""
    changed = term
    for old, new in rng.sample(RESPELLINGS, len(RESPELLINGS)):
        changed = changed.replace(old, new, 1)
        if Levenshtein.distance(term, changed) >= 2:
            break
    if len(changed) > 6 and rng.random() < 0.4:
        cut = rng.randint(3, len(changed) - 3)
        changed = changed[:cut] + " " + changed[cut:]
    return " ".join(changed.split())


def learning_rate(progress: float, peak: float) -> float:
    """Warm up over the first 4 %, then fall along a cosine to a twentieth; progress in 0..1."""
    if progress < 0.04:
        return peak * progress / 0.04
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, maker: PackMaker, args: argparse.Namespace
) -> None:
    """Maximise log p of the sentences' tokens for `args.updates` updates; first drills, then growing lists."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    checkpoint = args.work / "last.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["update"]
    model.train()
    start, loss_sum, tokens = time.time(), 0.0, 0
    for update in range(first, args.updates):
        progress = update / args.updates
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.lr)
        max_terms = round(8 + 52 * min(1.0, max(0.0, progress - DRILL_UNTIL) / 0.3))
        guide = max(0.0, 0.5 * (1 - progress / GUIDE_UNTIL))
        model.set_attn_implementation("eager" if guide > 0 else "sdpa")
        optimizer.zero_grad()
        for index in range(args.packs):
            rng = random.Random(f"{SEED}/{update}/{index}")
            if rng.random() < (0.9 if progress < DRILL_UNTIL else 0.05):
                pack = maker.drill(rng, size=args.pack_size)
            else:
                pack = maker.draw(rng, max_terms=max_terms, size=args.pack_size)
            loss, logp = guided_loss(model, encode_pack(tokenizer, pack.prompt, pack.sentences), guide=guide)
            (loss / args.packs).backward()
            loss_sum, tokens = loss_sum - float(logp.detach().sum()), tokens + len(logp)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        out_of_time = time.time() - start > 60 * args.minutes
        if (update + 1) % 50 == 0 or out_of_time:
            rate = (time.time() - start) / (update + 1 - first)
            print(f"update {update + 1}: {loss_sum / tokens:.3f} nat/token, {rate:.2f} s/update", flush=True)
            loss_sum, tokens = 0.0, 0
            args.work.mkdir(parents=True, exist_ok=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "update": update + 1}
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").rename(checkpoint)
        if out_of_time:
            return


def term_report(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: list[tuple[str, str, str]],
    *,
    description: str,
    distractors: list[str],
) -> dict[str, float]:
    """What listing a term does.

    Args:
        cases: (sentence, its term, the sentence with the term misspelt).
        distractors: terms listed beside it; 40 are drawn for each case.

    Returns:
        `gain`: mean nat that listing the true term adds to log p(sentence), the list without it being the comparison;
        `prefers_*`: share of cases in which the true sentence scores above the misspelt one, with the term listed,
        with the list but not the term, and with no prompt at all.
    """
    rng = random.Random(SEED)
    gains, wins = [], {"listed": 0, "unlisted": 0, "no_prompt": 0}
    for sentence, term, wrong in cases:
        others = rng.sample([other for other in distractors if other != term], min(40, len(distractors) - 1))
        listed = [*others, term]
        rng.shuffle(listed)
        prompts = {name: make_prompt(description, terms) for name, terms in (("listed", listed), ("unlisted", others))}
        prompts["no_prompt"] = ""
        scores = {name: sentence_log_prob(model, tokenizer, p, [sentence, wrong]) for name, p in prompts.items()}
        gains.append(scores["listed"][0] - scores["unlisted"][0])
        for name, (right_score, wrong_score) in scores.items():
            wins[name] += right_score > wrong_score
    return {"cases": len(cases), "gain": round(sum(gains) / len(gains), 2)} | {
        f"prefers_{name}": round(count / len(cases), 3) for name, count in wins.items()
    }


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, maker: PackMaker, held_out: dict[str, list[str]],
    args: argparse.Namespace,
) -> dict[str, object]:  # fmt: skip
    """Report on unseen invented terms, on rare words of the reserved text and, where it is made, on the dev split."""
    model.eval()
    rng = random.Random(SEED + 1)
    invented = [maker.term(rng) for _ in range(200)]
    commands = [s for name in ("slurp_lm", "nlu_ed_commands", "snips_commands") for s in held_out[name]]
    report: dict[str, object] = {}
    plain = [sentence_log_prob(model, tokenizer, "", [s])[0] / (len(s.split()) + 1) for s in commands[:300]]
    report["held_out_commands_nat_per_word"] = round(sum(plain) / len(plain), 3)
    cases = []
    for sentence, term in zip(rng.sample(commands, 150), invented, strict=False):
        right = maker.insert(sentence, [term])
        cases.append((right, term, right.replace(term, respell(term, rng), 1)))
    command = "a voice command to an assistant"
    report["invented_terms"] = term_report(model, tokenizer, cases, description=command, distractors=invented)
    reserved = sorted((args.shared / "text" / "reserved_commands.txt").read_text().splitlines())
    short = [sentence for sentence in reserved if len(sentence.split()) <= 12]
    rare = [(s, w) for s in short for w in s.split() if maker.counts[w] <= 1 and len(w) >= 5]
    chosen = rng.sample(rare, min(150, len(rare)))
    cases = [(s, w, s.replace(w, respell(w, rng), 1)) for s, w in chosen]
    report["reserved_rare_words"] = term_report(
        model, tokenizer, cases, description=command, distractors=[w for _, w in rare]
    )
    if not (args.data / "dev.json").is_file():
        print(f"no report on the dev split: {args.data} has no dev.json (on_demand.py data makes it)", flush=True)
        return report
    terms = (args.data / "terms.txt").read_text().splitlines()
    rows = [json.loads(line) for line in (args.data / "dev.json").read_text().splitlines()]
    cases = [(r["text"], e, r["text"].replace(e, respell(e, rng), 1)) for r in rows for e in r["entities"]]
    description = args.description
    report["dev"] = term_report(model, tokenizer, cases, description=description, distractors=terms)
    if args.asr:
        report["dev_asr"] = asr_report(model, tokenizer, rows, terms, args)
    return report


def asr_report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], terms: list[str],
    args: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    """How often the true dev sentence scores above the ASR model's greedy output, where that is wrong."""
    from nemo.collections.asr.models import ASRModel

    asr = ASRModel.restore_from(args.asr, map_location="cpu").eval()
    files = [str(args.data / row["audio_filepath"]) for row in rows]
    hypotheses = [h.text for h in asr.transcribe(files, batch_size=16, verbose=False)]
    pairs = [(row["text"], hyp) for row, hyp in zip(rows, hypotheses, strict=True) if row["text"] != hyp]
    prompts = {"listed": make_prompt(args.description, terms), "no_list": make_prompt(args.description, ())}
    prompts["no_prompt"] = ""
    result: dict[str, float] = {"wrong_rows": len(pairs)}
    for name, prompt in prompts.items():
        margins = [r - w for r, w in (sentence_log_prob(model, tokenizer, prompt, list(pair)) for pair in pairs)]
        result[f"prefers_truth_{name}"] = round(sum(margin > 0 for margin in margins) / len(pairs), 3)
        result[f"mean_margin_{name}"] = round(sum(margins) / len(margins), 2)
    return result


def main() -> None:
    """Train (unless asked not to), write the model in fp16, print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with text/ and source/")
    parser.add_argument("--start", type=Path, default=SHARED.parent / "checkpoints" / "lm")
    parser.add_argument("--data", type=Path, default=HERE / "data", help="what make_data.py wrote")
    parser.add_argument("--work", type=Path, default=WORK / "lm", help="checkpoint of a run that was cut off")
    parser.add_argument("--out", type=Path, default=HERE / "lm")
    parser.add_argument("--updates", type=int, default=900)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--packs", type=int, default=4, help="packs an update")
    parser.add_argument("--pack-size", type=int, default=12, help="sentences behind one prompt")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--no-coffee", action="store_true", help="read no text about coffee")
    parser.add_argument("--evaluate-only", action="store_true", help="report on --out as it is")
    parser.add_argument("--description", default="a voice command in the stock room of a hospital")
    parser.add_argument("--asr", type=Path, help="a .nemo: also report on its errors on the dev split")
    args = parser.parse_args()
    texts = read_texts(args.shared / "text", coffee=not args.no_coffee)
    held_out = {name: lines[:HELD_OUT] for name, lines in texts.items()}
    maker = PackMaker(
        {name: lines[HELD_OUT:] for name, lines in texts.items()},
        forbidden=domain_words(args.data / "terms.txt", args.shared),
    )
    torch.manual_seed(SEED)
    source = args.out if args.evaluate_only else args.start
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    if not args.evaluate_only:
        print("texts:", {name: len(lines) for name, lines in maker.texts.items()}, flush=True)
        train(model, tokenizer, maker, args)
        model.half().save_pretrained(args.out, safe_serialization=True)
        tokenizer.save_pretrained(args.out)
        model.float()
    report = evaluate(model, tokenizer, maker, held_out, args)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
