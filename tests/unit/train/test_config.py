from __future__ import annotations

import dataclasses
import inspect

import pytest

from addenda.bases import formats
from addenda.errors import ConfigError
from addenda.train.config import HARMLESS, ROUNDINGS, TrainConfig


def test_the_formats_to_train_through_are_those_that_are_packed():
    assert sorted(ROUNDINGS) == formats.names()
    assert TrainConfig(through="q4_1").through == "q4_1"
    with pytest.raises(ConfigError, match=r"through must be one of f32 f16 .*, got 'q4'"):
        TrainConfig(through="q4")


def test_defaults_are_valid_and_every_field_is_described():
    config = TrainConfig()
    assert (config.epochs, config.batch_size, config.patience, config.clip_norm) == (3, 16, 3, 1.0)
    source = inspect.getsource(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
        assert after.strip().startswith('"""'), field.name


BAD = [
    ({"epochs": 0}, "epochs must be a whole number >= 1"),
    ({"epochs": True}, "epochs must be a whole number >= 1"),
    ({"max_steps": 0}, "max_steps must be"),
    ({"learning_rate": 0.0}, "learning_rate must be a finite number > 0"),
    ({"learning_rate": float("inf")}, "learning_rate must be a finite number > 0"),
    ({"schedule": "cosinus"}, "schedule must be one of cosine, linear, constant"),
    ({"warmup_fraction": 1.0}, "warmup_fraction must be"),
    ({"min_lr_fraction": 1.5}, "min_lr_fraction must be at most 1"),
    ({"weight_decay": -0.1}, "weight_decay must be"),
    ({"betas": (0.9,)}, "betas must be two numbers"),
    ({"betas": (0.9, 1.0)}, "betas[1] must be"),
    ({"eps": 0.0}, "eps must be"),
    ({"clip_norm": 0.0}, "clip_norm must be"),
    ({"batch_size": 2.5}, "batch_size must be"),
    ({"tokens_per_micro_batch": 0}, "tokens_per_micro_batch must be"),
    ({"evals_per_epoch": 0}, "evals_per_epoch must be"),
    ({"eval_every_steps": -1}, "eval_every_steps must be"),
    ({"patience": 0}, "patience must be"),
    ({"save_every_minutes": 0}, "save_every_minutes must be"),
    ({"save_every_steps": 0}, "save_every_steps must be"),
    ({"keep_checkpoints": 1}, "keep_checkpoints must be a whole number >= 2"),
    ({"seed": -1}, "seed must be"),
    ({"threads": 0}, "threads must be"),
]


@pytest.mark.parametrize(("settings", "text"), BAD, ids=lambda value: str(value)[:40])
def test_a_setting_out_of_range_is_refused(settings, text):
    with pytest.raises(ConfigError, match="addenda train --help") as caught:
        TrainConfig(**settings)
    assert text in caught.value.message
    assert caught.value.exit_code == 2


def test_all_problems_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{key: value for settings, _ in BAD for key, value in settings.items()})
    for name in {key for settings, _ in BAD for key in settings}:
        assert name in caught.value.message


def test_a_list_of_betas_from_a_file_is_taken():
    assert TrainConfig(betas=[0.8, 0.9]).betas == (0.8, 0.9)


def test_identity_changes_with_every_setting_that_changes_the_result():
    other = {
        "epochs": 4, "max_steps": 9, "learning_rate": 0.5, "schedule": "linear", "warmup_fraction": 0.5,
        "min_lr_fraction": 0.5, "weight_decay": 0.5, "betas": (0.5, 0.5), "eps": 0.5, "clip_norm": None,
        "batch_size": 5, "tokens_per_micro_batch": 5, "evals_per_epoch": 5, "eval_every_steps": 5, "patience": None,
        "save_every_steps": 5, "save_every_minutes": None, "keep_checkpoints": 5, "seed": 5, "threads": 5,
        "seeds": 5, "sharding": "full", "kernels": "off", "memory_gib": 5.0, "optimizer": "adamw8bit",
        "offload": "none", "through": "q4_1",
        "export_to": "peft",
    }  # fmt: skip
    assert set(other) == {f.name for f in dataclasses.fields(TrainConfig)}
    same = TrainConfig().identity()
    for name, value in other.items():
        assert (TrainConfig(**{name: value}).identity() == same) == (name in HARMLESS), name
