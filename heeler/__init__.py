"""Heeler: PPO for language models, control and games, on one core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from heeler.envs.text import TextStep
    from heeler.envs.vector import EnvConfig
    from heeler.policies.language_model import Full, LoRA, SeparateCritic, TopLayers, ValueHead
    from heeler.policies.token_masks import OnlyTokens, WithoutTokens
    from heeler.ppo.advantages import AdvantageConfig
    from heeler.ppo.kl import AdaptiveKL, FixedKL
    from heeler.ppo.schedules import Schedule
    from heeler.ppo.shaping import ScoreShaping
    from heeler.ppo.update import PPOConfig
    from heeler.train.control import GymConfig, load_gym_run, load_policy, resume_gym, train_gym
    from heeler.train.dialogue import DialogueConfig, load_dialogue_run, resume_dialogue, train_dialogue
    from heeler.train.reward import RewardConfig
    from heeler.train.reward_run import RewardTask, resume_reward, train_reward
    from heeler.train.sft import SFTConfig, resume_sft, train_sft
    from heeler.train.text import TextConfig, load_text_run, resume_text, train_text
    from heeler.types import CheckFailed, HeelerError, Sampling

_HOMES = {
    "AdaptiveKL": "heeler.ppo.kl",
    "AdvantageConfig": "heeler.ppo.advantages",
    "CheckFailed": "heeler.types",
    "DialogueConfig": "heeler.train.dialogue",
    "EnvConfig": "heeler.envs.vector",
    "FixedKL": "heeler.ppo.kl",
    "Full": "heeler.policies.language_model",
    "GymConfig": "heeler.train.control",
    "HeelerError": "heeler.types",
    "LoRA": "heeler.policies.language_model",
    "OnlyTokens": "heeler.policies.token_masks",
    "PPOConfig": "heeler.ppo.update",
    "ScoreShaping": "heeler.ppo.shaping",
    "RewardConfig": "heeler.train.reward",
    "RewardTask": "heeler.train.reward_run",
    "SFTConfig": "heeler.train.sft",
    "Sampling": "heeler.types",
    "Schedule": "heeler.ppo.schedules",
    "SeparateCritic": "heeler.policies.language_model",
    "TextConfig": "heeler.train.text",
    "TextStep": "heeler.envs.text",
    "TopLayers": "heeler.policies.language_model",
    "ValueHead": "heeler.policies.language_model",
    "WithoutTokens": "heeler.policies.token_masks",
    "load_dialogue_run": "heeler.train.dialogue",
    "load_gym_run": "heeler.train.control",
    "load_policy": "heeler.train.control",
    "load_text_run": "heeler.train.text",
    "resume_dialogue": "heeler.train.dialogue",
    "resume_gym": "heeler.train.control",
    "resume_reward": "heeler.train.reward_run",
    "resume_sft": "heeler.train.sft",
    "resume_text": "heeler.train.text",
    "train_dialogue": "heeler.train.dialogue",
    "train_gym": "heeler.train.control",
    "train_reward": "heeler.train.reward_run",
    "train_sft": "heeler.train.sft",
    "train_text": "heeler.train.text",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:  # torch is imported when something that needs it is, not before
    if name not in _HOMES:
        raise AttributeError(f"module 'heeler' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
