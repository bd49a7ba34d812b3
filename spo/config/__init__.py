"""Configuration: one frozen model for each component; importable without torch and Ray.

Unknown keys are errors. A component takes only its own slice; only jobs, the pipeline and the sweep
see `RunConfig`. Names carry units.
"""

from spo.config.attacks import (
    AnyAttack,
    AttackConfig,
    PgdConfig,
    TemplateConfig,
    TypographicConfig,
)
from spo.config.datasets import DatasetConfig
from spo.config.evaluation import DefenceConfig, EvaluateConfig, JudgeConfig
from spo.config.load import load_config
from spo.config.run import (
    DEFAULT_CACHE,
    CorpusSettings,
    DataConfig,
    ModelConfig,
    RayConfig,
    RunConfig,
    SteeringConfig,
)
from spo.config.serving import ServeConfig
from spo.config.stage1 import (
    AdversarialSource,
    AttributionSource,
    ContinuationSource,
    EstimateConfig,
    ExtractConfig,
    FileSource,
    InstructionSource,
    SourceConfig,
    TypographicSource,
)
from spo.config.stage2 import EngineConfig, LearnConfig, RewardConfig, RolloutConfig

__all__ = [
    "DEFAULT_CACHE",
    "AdversarialSource",
    "AnyAttack",
    "AttackConfig",
    "AttributionSource",
    "ContinuationSource",
    "CorpusSettings",
    "DataConfig",
    "DatasetConfig",
    "DefenceConfig",
    "EngineConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ExtractConfig",
    "FileSource",
    "InstructionSource",
    "JudgeConfig",
    "LearnConfig",
    "ModelConfig",
    "PgdConfig",
    "RayConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "ServeConfig",
    "SourceConfig",
    "SteeringConfig",
    "TemplateConfig",
    "TypographicConfig",
    "TypographicSource",
    "load_config",
]
