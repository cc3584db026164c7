"""Work on NeMo ASR models: heads, exact log p(y|x), sampling, the frozen reference, LoRA, ``.nemo`` files."""
