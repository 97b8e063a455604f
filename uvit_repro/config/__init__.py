# ruff: noqa: F401  (what other rooms use of this one)
"""What one experiment is, and what its run is called."""

from uvit_repro.config.identity import (
    content_name,
    digest,
    eval_id,
    key_seed,
    main_metric,
    run_id,
    variant_name,
)
from uvit_repro.config.presets import CONTENT, DATASET_DEFAULTS, HEADS, PATHS, TABLE2, preset
from uvit_repro.config.protocols import (
    CONFIGS,
    LAPTOP,
    PROTOCOLS,
    SMOKE,
    data_root,
    default_protocol,
    deviations,
    experiment,
    project_root,
)
from uvit_repro.config.schema import (
    CONVS,
    DATASETS,
    MODELS,
    PARAMETERS,
    SAMPLERS,
    SKIPS,
    TIMES,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    ExecConfig,
    Experiment,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    check_experiment,
    check_geometry,
    check_params,
    describe,
    from_dict,
    refuse_fields,
    resolve_name,
    with_overrides,
)
from uvit_repro.config.settings import ParameterError, Section, read_options, setting
