"""Plumbtune: parameter-efficient fine-tuning of Llama models, with numbers that can be checked."""

import logging
import os
import warnings

__version__ = "0.1.0"

# Before any library is imported: nothing reports home, and nothing uses the network unasked
# (`finetune.model` lifts the second for a config that names a hub id).
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
OFFLINE_BY_CHOICE = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# bitsandbytes compiles functions at its import, for 2 seconds of every command, and once more at
# their first call, if there is a C++ compiler. Not compiled they give the same bits.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# On a CPU, oneDNN and torch's layer over it keep 0.6 to 2 MB for every shape of a product, 1,024 of
# them each; steps of packed rows differ in shape, and a layer needs about 25.
KERNELS_BY_CHOICE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY" in os.environ
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "48")
os.environ.setdefault("LRU_CACHE_CAPACITY", "48")

# What these say is either checked by ourselves (`finetune.model` refuses a missing or unexpected
# weight) or about the libraries' own next versions.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated")
