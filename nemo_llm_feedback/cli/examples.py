"""Two examples of every command, which its ``--help`` ends with."""

from __future__ import annotations

_CONTEXT = '--description "an order at a coffee shop" --terms-file menu.json'
_LLM = "--llm Qwen/Qwen2.5-7B-Instruct"
_WIDTH = 72
EXAMPLES = {
    "prepare": ("recordings/ --output calls.json", "meeting.m4a --output meeting.json --max-duration 10"),
    "score": (
        f"base.nemo --manifest calls.json {_LLM} {_CONTEXT}",
        f"base.nemo --manifest dev.json {_LLM} {_CONTEXT} --tune --utterances 0 --show 0",
    ),
    "adapt": (
        f"--base base.nemo --manifest calls.json {_LLM} {_CONTEXT} --output adapted.nemo",
        "--base base.nemo --manifest calls.json general.json --validation dev.json "
        f"{_LLM} {_CONTEXT} trainer=gpu runs=3",
    ),
    "transcribe": (
        "adapted.nemo audio/ --output out.json",
        f"base.nemo audio/ --rescore {_LLM} {_CONTEXT} --nbest 5 --output out.json",
    ),
    "evaluate": (
        "base.nemo adapted.nemo --manifest dev.json --terms-file menu.json --report report.html",
        "--predictions ours.json theirs.json --manifest dev.json --group-by speaker",
    ),
    "report": ("nemo_experiments/adapted/version_0", "nemo_experiments/adapted/version_0 --no-audio"),
    "runs": ("nemo_experiments", "nemo_experiments --json"),
    "export": (
        "run1.nemo run2.nemo run3.nemo --output mean.nemo",
        "mean.nemo --base base.nemo --interpolation 0.75 --output nearer.nemo",
    ),
}


def examples_text(command: str) -> str:
    """The examples of a command, with lines that fit a terminal and are broken before a flag."""
    lines = ["Examples:"]
    for words in EXAMPLES[command]:
        first, *flags = f"  nemo-llm-feedback {command} {words}".split(" --")
        lines.append(first)
        for flag in flags:
            if len(lines[-1]) + len(flag) > _WIDTH:
                lines[-1] += " \\"
                lines.append("     ")
            lines[-1] += f" --{flag}"
    return "\n".join(lines)
