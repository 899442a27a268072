"""The schema of a rewards file; each field's description is its documentation.

Two sections: ``scorers`` say what is computed, ``values`` what a client may align. Adding a kind
means a class here, its case in `registry.py`, and a file in ``models/``.
"""

from __future__ import annotations

from rewards.config.inputs import ChatInput, InputConfig, PairInput, TextInput
from rewards.config.judge import JudgeConfig
from rewards.config.models import (
    CausalLmConfig,
    EmbeddingConfig,
    LikelihoodConfig,
    ModelConfig,
    ProcessRewardConfig,
    SequenceClassifierConfig,
    Token,
    TokenOutputConfig,
)
from rewards.config.outputs import OutputConfig
from rewards.config.outside import PythonConfig, RemoteConfig
from rewards.config.pooling import VllmPoolingConfig
from rewards.config.text import LexicalConfig, SamplerLogprobConfig, VaderConfig
from rewards.config.transforms import TransformConfig
from rewards.config.values import (
    CheckConfig,
    MessageConfig,
    RewardsConfig,
    ScorerConfig,
    ValueConfig,
)
from rewards.config.verifiable import (
    JsonSchemaCheckConfig,
    NumberCheckConfig,
    RegexCheckConfig,
    TermsCheckConfig,
    VerifiableConfig,
    WordLimitsConfig,
)

__all__ = [
    "CausalLmConfig",
    "ChatInput",
    "CheckConfig",
    "EmbeddingConfig",
    "InputConfig",
    "JsonSchemaCheckConfig",
    "JudgeConfig",
    "LexicalConfig",
    "LikelihoodConfig",
    "MessageConfig",
    "ModelConfig",
    "NumberCheckConfig",
    "OutputConfig",
    "PairInput",
    "ProcessRewardConfig",
    "PythonConfig",
    "RegexCheckConfig",
    "RemoteConfig",
    "RewardsConfig",
    "SamplerLogprobConfig",
    "ScorerConfig",
    "SequenceClassifierConfig",
    "TermsCheckConfig",
    "TextInput",
    "Token",
    "TokenOutputConfig",
    "TransformConfig",
    "VaderConfig",
    "ValueConfig",
    "VerifiableConfig",
    "VllmPoolingConfig",
    "WordLimitsConfig",
]
