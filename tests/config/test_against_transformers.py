"""Names that the config shares with transformers, against the installed library itself."""

from __future__ import annotations

import inspect
from typing import get_args

from finetune.config import TrainSection
from finetune.config.train import SCHEDULER_KWARGS


def choices_of(key: str) -> tuple[str, ...]:
    return get_args(TrainSection.model_fields[key].annotation)


def test_every_schedule_takes_the_arguments_we_allow():
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

    set_elsewhere = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name in choices_of("lr_scheduler_type"):
        signature = inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name])
        assert set(signature.parameters) - set_elsewhere == set(SCHEDULER_KWARGS[name])


def test_every_optimiser_is_known():
    from transformers.training_args import OptimizerNames

    assert set(choices_of("optim")) <= {str(name.value) for name in OptimizerNames}


# transformers has nothing like on_spike and fit; early stopping is a callback's.
OF_CALLBACKS = {"early_stopping_patience", "early_stopping_threshold"}
OURS = {"on_spike", "fit"} | OF_CALLBACKS


def test_every_setting_is_one_of_training_arguments():
    from trl import SFTConfig  # transformers' with `activation_offloading`

    known = set(SFTConfig.__dataclass_fields__)
    assert set(TrainSection.model_fields) - OURS <= known
    assert not known & OURS


def test_early_stopping_is_named_as_its_callback_names_it():
    from transformers import EarlyStoppingCallback

    assert set(inspect.signature(EarlyStoppingCallback).parameters) == OF_CALLBACKS
