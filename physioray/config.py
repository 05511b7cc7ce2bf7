"""Settings of every room: frozen dataclasses, validated where they are made, dumped as JSON beside every run.

A variant is made with `dataclasses.replace`. Fields whose value the paper leaves open carry the metadata
`assumption`, a sentence that every run records (see `list_assumptions`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from physioray.signals import PAPER_MODALITIES, SPLITS, find_modality
from physioray.storage import hash_value

Config = TypeVar("Config")


def _assume(default: Any, sentence: str) -> Any:
    """A field with a default that the paper does not state."""
    return field(default=default, metadata={"assumption": sentence})


def _require(condition: bool, rule: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{rule}, but got {got!r}.")


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    _require(value in choices, f"{name} must be one of {', '.join(choices)}", value)


@dataclass(frozen=True, kw_only=True)
class ArousalRule:
    """When a window counts as an arousal (methods: prevalence of 2.74 % fits the paper's 2.7 %).

    Attributes:
        kind: `fraction` (covered for at least `min_fraction` of the window) or `any` (one sample suffices).
        min_fraction: share of the window that target arousal must cover.
        unscored: windows that hold samples marked not scored are kept as they are (`negative`) or
            their label is unknown (`drop`).
    """

    kind: Literal["fraction", "any"] = "fraction"
    min_fraction: float = 0.75
    unscored: Literal["negative", "drop"] = "negative"

    def __post_init__(self) -> None:
        _require_choice("ArousalRule.kind", self.kind, ("fraction", "any"))
        _require_choice("ArousalRule.unscored", self.unscored, ("negative", "drop"))
        _require(0 < self.min_fraction <= 1, "ArousalRule.min_fraction must be in (0, 1]", self.min_fraction)


AROUSAL_RULES = {
    "paper": ArousalRule(),
    "majority": ArousalRule(min_fraction=0.5),
    "any": ArousalRule(kind="any"),
}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How subjects are divided (Fang et al. 2024, section 3.1, numbers 657/117/219)."""

    test_fraction: float = _assume(0.22, "test subjects: 22 % of the labelled, rounded up")
    validation_fraction: float = _assume(0.15, "validation subjects: 15 % of what remains, rounded up")
    seed: int = _assume(42, "the split's seed")
    subset_sizes: tuple[int, ...] = _assume((25, 50, 100, 250, 500), "training subsets are nested")

    def __post_init__(self) -> None:
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            _require(0 < value < 1, f"SplitConfig.{name} must be in (0, 1)", value)


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How a recording becomes windows (Fang et al. 2024, section 3.1).

    Attributes:
        modalities: which to keep, by name.
        decimate_antialias: low-pass before decimation, so that nothing above the new Nyquist rate folds
            back; False is the paper's text to the letter.
        input_norm: the scale of a recording's channel: the standard deviation of the samples within
            8 robust deviations, or the interquartile range.
        clip: scaled signals are clipped at plus and minus this many scales.
        arousal_rule: see ArousalRule.
        age_threshold: years from which a subject counts as older.
        splits: see SplitConfig.
    """

    modalities: tuple[str, ...] = PAPER_MODALITIES
    decimate_antialias: bool = _assume(True, "an anti-alias low-pass at 0.45 x rate precedes decimation")
    transition: float = _assume(0.1, "zero-phase Hamming FIR with a 0.1 Hz transition at the lower edge")
    input_norm: Literal["recording_std", "recording_iqr"] = _assume(
        "recording_std", "scale per recording and channel: standard deviation within 8 robust deviations"
    )
    clip: float = _assume(8.0, "scaled signals are clipped at +-8")
    arousal_rule: ArousalRule = _assume(ArousalRule(), "arousal: target arousal covers >= 75 % of the window")
    age_threshold: float = 55.0
    splits: SplitConfig = SplitConfig()

    def __post_init__(self) -> None:
        _require(len(self.modalities) > 0, "IngestConfig.modalities must name at least one", self.modalities)
        _require(
            len(set(self.modalities)) == len(self.modalities),
            "IngestConfig.modalities must not repeat",
            self.modalities,
        )
        for name in self.modalities:
            find_modality(name)
        _require_choice("IngestConfig.input_norm", self.input_norm, ("recording_std", "recording_iqr"))
        _require(self.clip > 0, "IngestConfig.clip must be positive", self.clip)
        _require(self.transition > 0, "IngestConfig.transition must be positive", self.transition)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the fused transformer (Fang et al. 2024, section 3.2)."""

    modalities: tuple[str, ...] = PAPER_MODALITIES
    width: int = 512
    layers: int = 8
    heads: int = 8
    dropout: float = 0.1
    mlp_ratio: int = _assume(4, "MLP width is 4 x the model's, GELU")
    tokenizer_channels: int = 64
    tokenizer_kernel: int = 21
    tokenizer_pool: int = _assume(4, "tokenizer: stride 1, padding 10, GELU, max pool over 4 samples")
    decoder_layers: int = 1
    decoder_residual: bool = _assume(True, "a residual path around the decoder's cross-attention")
    mask_token: Literal["per_decoder", "shared"] = _assume("per_decoder", "each decoder has its own mask token")

    def __post_init__(self) -> None:
        _require(len(self.modalities) > 0, "ModelConfig.modalities must name at least one", self.modalities)
        for name in self.modalities:
            find_modality(name)
        _require(self.width % self.heads == 0, "ModelConfig.width must be a multiple of heads", self.width)
        _require(self.width % 2 == 0, "ModelConfig.width must be even (sine and cosine positions)", self.width)
        _require(0 <= self.dropout < 1, "ModelConfig.dropout must be in [0, 1)", self.dropout)
        _require(self.tokenizer_kernel % 2 == 1, "ModelConfig.tokenizer_kernel must be odd", self.tokenizer_kernel)
        _require_choice("ModelConfig.mask_token", self.mask_token, ("per_decoder", "shared"))


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Which tokens a model sees in pretraining (Fang et al. 2024, section 3.3 and appendix C).

    Attributes:
        hidden_ratio: share of the present modalities' tokens that is hidden, drop included. With four
            modalities 0.7 leaves 36 of 120 tokens visible in both arms.
        sampler: how the visible tokens are shared among the modalities: `uniform` without regard to modality
            (the paper), `dirichlet` by shares drawn from a Dirichlet distribution (Bachmann et al. 2022, MultiMAE),
            `subset` uniformly among a random part of the modalities.
        concentration: of the Dirichlet distribution; large values give equal shares, small ones favour one modality.
        drop: hide one whole modality in every batch, and the rest of `hidden_ratio` among the others, as the
            sampler says.
        drop_probability: probability that a batch drops a modality; the paper's arm is 1.
        drop_scope: one draw for the global batch, for each worker's share, or for each window.
    """

    hidden_ratio: float = 0.7
    sampler: Literal["uniform", "dirichlet", "subset"] = "uniform"
    concentration: float = 1.0
    drop: bool = True
    drop_probability: float = 1.0
    drop_scope: Literal["batch", "rank", "sample"] = _assume(
        "batch", "the dropped modality is drawn once per step for all workers"
    )

    def __post_init__(self) -> None:
        _require(0 < self.hidden_ratio < 1, "MaskConfig.hidden_ratio must be in (0, 1)", self.hidden_ratio)
        _require(
            0 <= self.drop_probability <= 1, "MaskConfig.drop_probability must be in [0, 1]", self.drop_probability
        )
        _require_choice("MaskConfig.sampler", self.sampler, ("uniform", "dirichlet", "subset"))
        _require(self.concentration > 0, "MaskConfig.concentration must be positive", self.concentration)
        _require_choice("MaskConfig.drop_scope", self.drop_scope, ("batch", "rank", "sample"))


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """The masked reconstruction loss (Fang et al. 2024, section 3.3)."""

    mask: MaskConfig = MaskConfig()
    weighting: Literal["modality", "token"] = _assume(
        "modality", "loss: mean over hidden tokens of a modality, then mean over modalities"
    )
    normalise_target: bool = _assume(False, "targets are the scaled samples, not normalised per chunk")

    def __post_init__(self) -> None:
        _require_choice("ReconstructionConfig.weighting", self.weighting, ("modality", "token"))


@dataclass(frozen=True, kw_only=True)
class LateFusionConfig:
    """One encoder per modality, joined only behind the encoders (Fang et al. 2024, appendix F.1).

    Attributes:
        model: sizes of every encoder; the decoders' settings are not used.
        layers_per_modality: `same` gives each encoder as many layers as the fused transformer, `parity` so many
            that all together have about its parameters, a number gives that many.
        learned_temperature: the model learns exp(t) as the factor on similarities, and the objective's fixed
            temperature is not used.
    """

    model: ModelConfig = ModelConfig()
    layers_per_modality: Literal["same", "parity"] | int = _assume(
        "same", "late fusion: each modality has its own encoder, with as many layers as the fused one"
    )
    projection_activation: Literal["relu", "gelu"] = _assume("relu", "ReLU inside the two-layer projection")
    learned_temperature: bool = False
    log_scale_limits: tuple[float, float] = _assume(
        (0.0, 4.6), "learned temperature: exp(t) starts at 1 and stays within 1 and 100"
    )

    def __post_init__(self) -> None:
        layers, (low, high) = self.layers_per_modality, self.log_scale_limits
        _require(
            layers in ("same", "parity") or (isinstance(layers, int) and layers >= 1),
            "LateFusionConfig.layers_per_modality must be same, parity or a number of at least 1",
            layers,
        )
        _require_choice("LateFusionConfig.projection_activation", self.projection_activation, ("relu", "gelu"))
        _require(self.model.width % 4 == 0, "LateFusionConfig.model.width must be a multiple of 4", self.model.width)
        _require(low <= high, "LateFusionConfig.log_scale_limits must be in ascending order", self.log_scale_limits)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities, as in ModelConfig."""
        return self.model.modalities

    @property
    def layers(self) -> int:
        """Layers of each encoder."""
        if isinstance(self.layers_per_modality, int):
            return self.layers_per_modality
        if self.layers_per_modality == "same":
            return self.model.layers
        # Tokenizers are the same in both, so the layers alone decide: spread the fused model's over the encoders.
        return max(1, round(self.model.layers / len(self.model.modalities)))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How a window is disturbed before it is compared (after Raghu et al. 2022, as others re-implemented it)."""

    noise: float = _assume(0.25, "augmentation: Gaussian noise of 0.25 x the window's standard deviation")
    block: float = _assume(0.25, "augmentation: one stretch of 25 % of the window is zeroed, per modality")

    def __post_init__(self) -> None:
        _require(self.noise >= 0, "AugmentConfig.noise must not be negative", self.noise)
        _require(0 <= self.block < 1, "AugmentConfig.block must be in [0, 1)", self.block)


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """The contrastive objectives (Fang et al. 2024, appendix F).

    Attributes:
        method: `simclr` compares adjacent windows, `pairwise` every two modalities of a window,
            `leave_one_out` each modality with the mean of the others.
        temperature: fixed; similarities are divided by it inside the exponent. Of no effect on a model that
            learns its own.
        augment: how windows are disturbed; used by `simclr` alone.
    """

    method: Literal["simclr", "pairwise", "leave_one_out"] = "leave_one_out"
    temperature: float = _assume(0.1, "logits are cosine similarities divided by 0.1")
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        _require_choice("ContrastiveConfig.method", self.method, ("simclr", "pairwise", "leave_one_out"))
        _require(self.temperature > 0, "ContrastiveConfig.temperature must be positive", self.temperature)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop (Fang et al. 2024, section 3.5)."""

    passes: int = 2000
    batch_size: int = _assume(1024, "global batch size")
    learning_rate: float = 1e-4
    warmup_passes: float = 10.0
    final_learning_rate: float = _assume(0.0, "the cosine ends at 0")
    betas: tuple[float, float] = _assume((0.9, 0.95), "AdamW betas")
    weight_decay: float = _assume(0.05, "AdamW weight decay, none on biases, norms and learned vectors")
    clip_norm: float = _assume(1.0, "gradients are clipped at norm 1")
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    seed: int = 0
    checkpoint_minutes: float = 15.0
    validate_every: int = 1
    select: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        _require(self.passes >= 1, "TrainConfig.passes must be at least 1", self.passes)
        _require(self.batch_size >= 1, "TrainConfig.batch_size must be at least 1", self.batch_size)
        _require(self.learning_rate > 0, "TrainConfig.learning_rate must be positive", self.learning_rate)
        _require(self.warmup_passes >= 0, "TrainConfig.warmup_passes must not be negative", self.warmup_passes)
        _require_choice("TrainConfig.precision", self.precision, ("fp32", "bf16", "fp16"))
        _require_choice("TrainConfig.select", self.select, ("best", "last"))


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The linear probe: the converged solver (headline) and the paper's recipe (section 3.5)."""

    tasks: tuple[str, ...] = ("sleep", "age", "arousal")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    penalties: tuple[float, ...] = _assume(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "converged probe: L2 strength C chosen on validation"
    )
    class_weights: bool = _assume(True, "class weights n / (classes x count) from the training subset")
    recipe_passes: int = 200
    recipe_min_steps: int = _assume(5000, "the paper's 200 passes, but at least 5,000 steps")
    recipe_batch_size: int = _assume(512, "probe batch size")
    recipe_learning_rate: float = 1e-4
    recipe_weight_decay: float = _assume(0.01, "probe weight decay")
    folds: int = 5
    cross_validate_below: int = 100
    bootstrap_draws: int = 500


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig:
    """How a checkpoint is looked into (Fang et al. 2024, section 4.4): on how much, and with which choices.

    Attributes:
        splits: whose windows, in order: the next split's only where those before have too few.
        windows: how many for attention and reconstruction.
        contexts, draws: of the source variance; one modality is exchanged `draws` times in each context.
        hidden_ratio: share of tokens hidden for the reconstructions; the same tokens for every checkpoint.
        examples: windows whose reconstruction is kept to be drawn.
    """

    splits: tuple[str, ...] = ("test", "validation", "train")
    windows: int = _assume(1000, "attention maps: mean over 1,000 windows")
    contexts: int = _assume(32, "source variance: mean over 32 contexts")
    draws: int = _assume(128, "source variance: 128 draws of a modality in each context")
    hidden_ratio: float = 0.7
    examples: int = 2
    batch_size: int = 32
    seed: int = 0
    bootstrap_draws: int = 500

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("contexts", 1), ("draws", 2), ("batch_size", 1), ("examples", 0)):
            _require(
                getattr(self, name) >= least, f"AnalysisConfig.{name} must be at least {least}", getattr(self, name)
            )
        _require(0 < self.hidden_ratio < 1, "AnalysisConfig.hidden_ratio must be in (0, 1)", self.hidden_ratio)
        for split in self.splits:
            _require_choice("AnalysisConfig.splits", split, SPLITS)


def to_dict(config: object) -> dict[str, Any]:
    """A config as plain JSON values, nested like the config."""
    if not is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"A config must be a dataclass instance, but got {type(config).__name__}.")
    return dataclasses.asdict(config)


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Build a config from plain values; a key that does not exist is an error that lists those that do."""
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"{kind.__name__} has the fields {', '.join(known)}, but got {', '.join(unknown)}.")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        default = known[name].default
        if isinstance(value, dict) and is_dataclass(default):
            arguments[name] = from_dict(type(default), value)
        else:
            arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def hash_config(*configs: object) -> str:
    """First twelve hexadecimal digits of the hash of configs: equal settings, equal hash."""
    return hash_value([to_dict(config) for config in configs])[:12]


def list_assumptions(*configs: object) -> dict[str, str]:
    """What the paper leaves open and these configs decide: field, value and the default's sentence."""
    found: dict[str, str] = {}
    for config in configs:
        for item in fields(config):  # type: ignore[arg-type]
            value = getattr(config, item.name)
            sentence = item.metadata.get("assumption")
            if sentence:
                found[f"{type(config).__name__}.{item.name}"] = f"{value!r} (default: {sentence})"
            if is_dataclass(value):
                found |= list_assumptions(value)
    return found
