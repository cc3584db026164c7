"""Packaging of nemo_llm_feedback. The shipped configurations live in ``conf/`` and go into the package as data."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "nemo_llm_feedback/core/version.py").read_text())[1]
REMOTE = ["openai>=3.50", "httpx2>=2.16"]  # the client of a scoring server, and its HTTP transport
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.30"]
CUDA = ["numba-cuda[cu13]>=0.30", "cuda-python>=13,<14"]  # NeMo's RNN-T and TDT loss, and CUDA graphs in its decoders

setup(
    name="nemo_llm_feedback",
    version=VERSION,
    description="Adapts NeMo ASR checkpoints to unlabeled audio with the feedback of a frozen 4-bit LLM",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="nemo_llm_feedback developers",
    project_urls={"Paper": "https://arxiv.org/abs/2506.11091"},
    keywords="speech recognition, ASR, NeMo, reinforcement learning, LLM, domain adaptation, rescoring",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Multimedia :: Sound/Audio :: Speech",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10,<3.13",
    packages=[*find_packages(include=["nemo_llm_feedback*"]), "nemo_llm_feedback.conf"],
    package_dir={"nemo_llm_feedback.conf": "conf"},
    package_data={
        "nemo_llm_feedback.conf": ["*.yaml", "*/*.yaml"],
        "nemo_llm_feedback": ["py.typed"],
        "nemo_llm_feedback.evaluation": ["everyday/*", "everyday/audio/*"],
        "nemo_llm_feedback.evaluation.report": ["templates/*"],
        "nemo_llm_feedback.llm": ["templates/*"],
    },
    install_requires=[
        "nemo_toolkit[asr]>=3.0,<3.1",
        "torch>=2.11",  # older ones keep autocast's casts made under no_grad: weights then get no gradient
        "transformers>=5.23",
        "gguf>=0.19",
        "bitsandbytes>=0.49",
        "accelerate>=1.0",
        "jellyfish>=1.1",
        "jiwer>=4.0",
        "num2words>=0.5.14",
        "kaldialign>=0.9",
        "rapidfuzz>=3.0",
        "hydra-core>=1.3",
        "cyclopts>=5.5",
        "pydantic>=2.10",
        "pydantic_core",
        "peft>=0.17",
        "omegaconf>=2.3",
        "braceexpand",
        "huggingface_hub>=1.0",
        "pyyaml",
        "torchmetrics>=1.0",
        "rich>=13.7",
        "lightning>=2.4",
        "numpy",
        "soxr",
        "safetensors",
        "scipy",
        "soundfile",
        "librosa",
        "jinja2>=3.1",
        "markupsafe>=2.1",
        "matplotlib",
        "silero-vad>=6",
        "tensorboard",
        "pandas",
        "pyarrow",
    ],
    extras_require={
        "remote": REMOTE,
        "cuda": CUDA,
        "docs": DOCS,
        "dev": [
            *[*REMOTE, "pytest", "pytest-cov", "pytest-xdist", "hypothesis", "psutil", "ruff", "mypy"],
            *["build", "setuptools>=77", "nbclient", "nbformat", "ipykernel"],  # the wheel, and the notebooks
        ],
    },
    entry_points={"console_scripts": ["nemo-llm-feedback = nemo_llm_feedback.cli.main:main"]},
)
