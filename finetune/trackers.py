"""Trackers: their packages, and that what they are told stays on this machine.

transformers' own callbacks write to them. Each is given a place in the run folder and told to send
nothing; what a person has set in the environment stands.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from finetune.errors import InputError

_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
_LOCAL = {
    "tensorboard": {"TENSORBOARD_LOGGING_DIR": "{run}/tensorboard"},
    "wandb": {
        "WANDB_MODE": "offline",
        "WANDB_DIR": "{run}",
        "WANDB_PROJECT": "plumbtune",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_DISABLE_GIT": "true",
    },
    "mlflow": {
        "MLFLOW_TRACKING_URI": "sqlite:///{run}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": "plumbtune",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
    },
    "trackio": {
        "TRACKIO_DIR": "{run}/trackio",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    },
}
"""Environment variables by tracker, where nobody has set them. Source: each package's own pages."""


def refuse_missing(tracker: str) -> None:
    """Looks for a tracker's package, before anything is loaded for a run that it would end.

    Args:
        tracker: `train.report_to`.

    Raises:
        InputError: it is not installed.
    """
    if tracker == "none" or any(map(_is_installed, _PACKAGES.get(tracker, (tracker,)))):
        return
    raise InputError(
        f"train.report_to {tracker}: needs the package {tracker}, which is not installed; "
        f"`pip install plumbtune[{tracker}]`, or `pip install {tracker}`; train.report_to=none "
        "does without (metrics.jsonl has every number)"
    )


def keep_local(tracker: str, run: Path) -> None:
    """Sets a tracker's place and silence, where the environment does not say otherwise.

    Args:
        run: the run folder.
    """
    for name, value in _LOCAL.get(tracker, {}).items():
        os.environ.setdefault(name, value.format(run=run.resolve()))


def _is_installed(package: str) -> bool:
    """A folder of that name, such as a tracker leaves where it ran, is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
