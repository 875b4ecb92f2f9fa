"""Plumbtune: parameter-efficient fine-tuning of Llama models, with numbers that can be checked."""

import os

__version__ = "0.1.0"

# Before any library is imported: nothing reports home, and nothing uses the network unasked
# (`finetune.model` lifts the second for a config that names a hub id).
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
