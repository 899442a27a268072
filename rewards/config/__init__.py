"""The schema of a rewards file; each field's description is its documentation.

Two sections: ``scorers`` say what is computed, ``values`` what a client may align. Adding a kind
means a class here, its case in `registry.py`, and a file in ``models/``.
"""

from __future__ import annotations

from rewards.config.inputs import ChatInput, InputConfig, PairInput, TextInput
from rewards.config.judge import JudgeConfig
from rewards.config.models import SequenceClassifierConfig
from rewards.config.outputs import OutputConfig
from rewards.config.outside import PythonConfig, RemoteConfig
from rewards.config.text import LexicalConfig, SamplerLogprobConfig, VaderConfig
from rewards.config.values import RewardsConfig, ScorerConfig, ValueConfig
from rewards.config.verifiable import (
    JsonSchemaCheckConfig,
    NumberCheckConfig,
    RegexCheckConfig,
    TermsCheckConfig,
    VerifiableConfig,
    WordLimitsConfig,
)

__all__ = [
    "ChatInput",
    "InputConfig",
    "JsonSchemaCheckConfig",
    "JudgeConfig",
    "LexicalConfig",
    "NumberCheckConfig",
    "OutputConfig",
    "PairInput",
    "PythonConfig",
    "RegexCheckConfig",
    "RemoteConfig",
    "RewardsConfig",
    "SamplerLogprobConfig",
    "ScorerConfig",
    "SequenceClassifierConfig",
    "TermsCheckConfig",
    "TextInput",
    "VaderConfig",
    "ValueConfig",
    "VerifiableConfig",
    "WordLimitsConfig",
]
