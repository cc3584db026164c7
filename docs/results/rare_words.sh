# shellcheck shell=bash disable=SC2034,SC2086
# The commands behind rare_words*.csv. Run them in the root of a checkout, a block at a time, not as one script: hours of
# training on data in ../shared, which is not part of the project. A folder (--out) keeps the rows it has.
# Recipes before these are in the history of docs/results/ (pages until November 2026).

# rare_words_dev.csv, rare_words_test.csv; table.py as in barista.sh
nemo-llm-feedback score ../shared/checkpoints/ctc.nemo --manifest ../shared/data/rare_words/dev.json --tune --show 0 \
    --utterances 0 --description "a sentence read from a book" --llm examples/experiments/invented_names/lm
rare() { python examples/experiments/rare_words.py ../shared/data ../shared/checkpoints/ctc.nemo --held "$@"; }
rare --out rare --alpha 4 --steps 244 --rows feedback self_training --inference beam boosted rescored feedback_rescored
rare --out rare_own --alpha 2 --transductive --max-duration 20 --rows feedback self_training \
    --set reward=entity reward.settings.weight=3 reward.beta=2 --inference feedback_rescored
rare --out rare_own_last --alpha 2 --transductive --max-duration 20 --rows feedback \
    --set reward=entity reward.settings.weight=3 reward.beta=2 guards.every=0
rare --out rare_own_test --alpha 2 --transductive --max-duration 20 --split test --steps 408 --rows feedback \
    --set reward=entity reward.settings.weight=3 reward.beta=2 feedback.refresh_every=34
nemo-llm-feedback export rare_own_test/runs/feedback_seed1/version_0/checkpoints/*-last.ckpt --output rare_own_test/last.nemo
rare --out rare_test --alpha 4 --split test --rows --inference beam boosted rescored
nemo-llm-feedback score ../shared/checkpoints/ctc.nemo --manifest ../shared/data/rare_words/test.json --utterances 0 --show 0 \
    --description "a sentence read from a book" --llm examples/experiments/invented_names/lm --alpha 4 --beta 8   # oracle
