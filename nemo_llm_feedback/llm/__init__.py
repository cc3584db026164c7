"""The frozen LLM that scores texts: ``load_llm(config).score([(context, texts)])`` returns log p(text | context).

transformers is imported only when a tokenizer or a model is loaded; ``check_llm_folder`` finds the faults of an
unusable LLM without it.
"""

# ruff: noqa: F401  (what the other rooms and users import from here)

from nemo_llm_feedback.llm.folder import check_llm_folder, resolve_folder
from nemo_llm_feedback.llm.loading import estimate_memory, pick_placement
from nemo_llm_feedback.llm.scorer import LLMScorer, TextScore, load_llm, open_llm
