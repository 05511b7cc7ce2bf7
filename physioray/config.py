"""Settings of every room: frozen dataclasses, validated where they are made, dumped as JSON beside every run.

A variant is made with `dataclasses.replace`. Fields whose value the paper leaves open carry the metadata
`assumption`, a sentence that every run records (see `list_assumptions`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from physioray.signals import PAPER_MODALITIES, STAGES, find_modality, find_task
from physioray.storage import hash_value

Config = TypeVar("Config")


def assume(default: Any, sentence: str) -> Any:
    """A field with a default that the paper does not state."""
    return field(default=default, metadata={"assumption": sentence})


def require(condition: bool, rule: str, got: object) -> None:
    """Refuse a value that breaks a rule, which the message states."""
    if not condition:
        raise ValueError(f"{rule}, but got {got!r}.")


def require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices, which the message lists."""
    require(value in choices, f"{name} must be one of {', '.join(choices)}", value)


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
        require_choice("ArousalRule.kind", self.kind, ("fraction", "any"))
        require_choice("ArousalRule.unscored", self.unscored, ("negative", "drop"))
        require(0 < self.min_fraction <= 1, "ArousalRule.min_fraction must be in (0, 1]", self.min_fraction)


AROUSAL_RULES = {
    "paper": ArousalRule(),
    "majority": ArousalRule(min_fraction=0.5),
    "any": ArousalRule(kind="any"),
}


@dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How subjects are divided (Fang et al. 2024, section 3.1, numbers 657/117/219)."""

    test_fraction: float = assume(0.22, "test subjects: 22 % of the labelled, rounded up")
    validation_fraction: float = assume(0.15, "validation subjects: 15 % of what remains, rounded up")
    seed: int = assume(42, "the split's seed")
    subset_sizes: tuple[int, ...] = assume((25, 50, 100, 250, 500), "training subsets are nested")

    def __post_init__(self) -> None:
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            require(0 < value < 1, f"SplitConfig.{name} must be in (0, 1)", value)


@dataclass(frozen=True, kw_only=True)
class Montage:
    """What a user says about the names in their recordings (`--channels`; read by `data/montage`).

    Attributes:
        choices: modality, channel and the channel to subtract (or empty), in order of preference; a modality that is
            named here takes nothing else.
        stages: name of a stage in the user's files, and the stage (or `undefined`) that it means.
    """

    choices: tuple[tuple[str, str, str], ...] = ()
    stages: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for modality, channel, _ in self.choices:
            find_modality(modality)
            require(channel != "", f"Montage.choices must name a channel for {modality}", channel)
        for name, stage in self.stages:
            require_choice(f"Montage.stages: the meaning of {name!r}", stage, (*STAGES, "undefined"))


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
        montage: see Montage.
    """

    modalities: tuple[str, ...] = PAPER_MODALITIES
    decimate_antialias: bool = assume(True, "an anti-alias low-pass at 0.45 x rate precedes decimation")
    transition: float = assume(0.1, "zero-phase Hamming FIR with a 0.1 Hz transition at the lower edge")
    input_norm: Literal["recording_std", "recording_iqr"] = assume(
        "recording_std", "scale per recording and channel: standard deviation within 8 robust deviations"
    )
    clip: float = assume(8.0, "scaled signals are clipped at +-8")
    arousal_rule: ArousalRule = assume(ArousalRule(), "arousal: target arousal covers >= 75 % of the window")
    age_threshold: float = 55.0
    splits: SplitConfig = SplitConfig()
    montage: Montage = Montage()

    def __post_init__(self) -> None:
        require(len(self.modalities) > 0, "IngestConfig.modalities must name at least one", self.modalities)
        require(
            len(set(self.modalities)) == len(self.modalities),
            "IngestConfig.modalities must not repeat",
            self.modalities,
        )
        for name in self.modalities:
            find_modality(name)
        require_choice("IngestConfig.input_norm", self.input_norm, ("recording_std", "recording_iqr"))
        require(self.clip > 0, "IngestConfig.clip must be positive", self.clip)
        require(self.transition > 0, "IngestConfig.transition must be positive", self.transition)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the fused transformer (Fang et al. 2024, section 3.2)."""

    modalities: tuple[str, ...] = PAPER_MODALITIES
    width: int = 512
    layers: int = 8
    heads: int = 8
    dropout: float = 0.1
    mlp_ratio: int = assume(4, "MLP width is 4 x the model's, GELU")
    tokenizer_channels: int = 64
    tokenizer_kernel: int = 21
    tokenizer_pool: int = assume(4, "tokenizer: stride 1, padding 10, GELU, max pool over 4 samples")
    decoder_layers: int = 1
    decoder_residual: bool = assume(True, "a residual path around the decoder's cross-attention")
    mask_token: Literal["per_decoder", "shared"] = assume("per_decoder", "each decoder has its own mask token")

    def __post_init__(self) -> None:
        require(len(self.modalities) > 0, "ModelConfig.modalities must name at least one", self.modalities)
        for name in self.modalities:
            find_modality(name)
        require(self.width % self.heads == 0, "ModelConfig.width must be a multiple of heads", self.width)
        require(self.width % 2 == 0, "ModelConfig.width must be even (sine and cosine positions)", self.width)
        require(0 <= self.dropout < 1, "ModelConfig.dropout must be in [0, 1)", self.dropout)
        require(self.tokenizer_kernel % 2 == 1, "ModelConfig.tokenizer_kernel must be odd", self.tokenizer_kernel)
        require_choice("ModelConfig.mask_token", self.mask_token, ("per_decoder", "shared"))


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
    drop_scope: Literal["batch", "rank", "sample"] = assume(
        "batch", "the dropped modality is drawn once per step for all workers"
    )

    def __post_init__(self) -> None:
        require(0 < self.hidden_ratio < 1, "MaskConfig.hidden_ratio must be in (0, 1)", self.hidden_ratio)
        require(0 <= self.drop_probability <= 1, "MaskConfig.drop_probability must be in [0, 1]", self.drop_probability)
        require_choice("MaskConfig.sampler", self.sampler, ("uniform", "dirichlet", "subset"))
        require(self.concentration > 0, "MaskConfig.concentration must be positive", self.concentration)
        require_choice("MaskConfig.drop_scope", self.drop_scope, ("batch", "rank", "sample"))


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """The masked reconstruction loss (Fang et al. 2024, section 3.3)."""

    mask: MaskConfig = MaskConfig()
    weighting: Literal["modality", "token"] = assume(
        "modality", "loss: mean over hidden tokens of a modality, then mean over modalities"
    )
    normalise_target: bool = assume(False, "targets are the scaled samples, not normalised per chunk")

    def __post_init__(self) -> None:
        require_choice("ReconstructionConfig.weighting", self.weighting, ("modality", "token"))


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
    layers_per_modality: Literal["same", "parity"] | int = assume(
        "same", "late fusion: each modality has its own encoder, with as many layers as the fused one"
    )
    projection_activation: Literal["relu", "gelu"] = assume("relu", "ReLU inside the two-layer projection")
    learned_temperature: bool = False
    log_scale_limits: tuple[float, float] = assume(
        (0.0, 4.6), "learned temperature: exp(t) starts at 1 and stays within 1 and 100"
    )

    def __post_init__(self) -> None:
        layers, (low, high) = self.layers_per_modality, self.log_scale_limits
        require(
            layers in ("same", "parity") or (isinstance(layers, int) and layers >= 1),
            "LateFusionConfig.layers_per_modality must be same, parity or a number of at least 1",
            layers,
        )
        require_choice("LateFusionConfig.projection_activation", self.projection_activation, ("relu", "gelu"))
        require(self.model.width % 4 == 0, "LateFusionConfig.model.width must be a multiple of 4", self.model.width)
        require(low <= high, "LateFusionConfig.log_scale_limits must be in ascending order", self.log_scale_limits)

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

    noise: float = assume(0.25, "augmentation: Gaussian noise of 0.25 x the window's standard deviation")
    block: float = assume(0.25, "augmentation: one stretch of 25 % of the window is zeroed, per modality")

    def __post_init__(self) -> None:
        require(self.noise >= 0, "AugmentConfig.noise must not be negative", self.noise)
        require(0 <= self.block < 1, "AugmentConfig.block must be in [0, 1)", self.block)


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
    temperature: float = assume(0.1, "logits are cosine similarities divided by 0.1")
    augment: AugmentConfig = AugmentConfig()

    def __post_init__(self) -> None:
        require_choice("ContrastiveConfig.method", self.method, ("simclr", "pairwise", "leave_one_out"))
        require(self.temperature > 0, "ContrastiveConfig.temperature must be positive", self.temperature)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop (Fang et al. 2024, section 3.5)."""

    passes: int = 2000
    batch_size: int = assume(1024, "global batch size")
    learning_rate: float = 1e-4
    warmup_passes: float = 10.0
    final_learning_rate: float = assume(0.0, "the cosine ends at 0")
    betas: tuple[float, float] = assume((0.9, 0.95), "AdamW betas")
    weight_decay: float = assume(0.05, "AdamW weight decay, none on biases, norms and learned vectors")
    clip_norm: float = assume(1.0, "gradients are clipped at norm 1")
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    seed: int = 0
    checkpoint_minutes: float = 15.0
    validate_every: int = 1
    select: Literal["best", "last"] = "last"

    def __post_init__(self) -> None:
        require(self.passes >= 1, "TrainConfig.passes must be at least 1", self.passes)
        require(self.batch_size >= 1, "TrainConfig.batch_size must be at least 1", self.batch_size)
        require(self.learning_rate > 0, "TrainConfig.learning_rate must be positive", self.learning_rate)
        require(self.warmup_passes >= 0, "TrainConfig.warmup_passes must not be negative", self.warmup_passes)
        require_choice("TrainConfig.precision", self.precision, ("fp32", "bf16", "fp16"))
        require_choice("TrainConfig.select", self.select, ("best", "last"))


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The linear probe: the converged solver (headline) and the paper's recipe (section 3.5)."""

    tasks: tuple[str, ...] = ("sleep", "age", "arousal")
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    penalties: tuple[float, ...] = assume(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0), "converged probe: L2 strength C chosen on validation"
    )
    class_weights: bool = assume(True, "class weights n / (classes x count) from the training subset")
    recipe_passes: int = 200
    recipe_min_steps: int = assume(5000, "the paper's 200 passes, but at least 5,000 steps")
    recipe_batch_size: int = assume(512, "probe batch size")
    recipe_learning_rate: float = 1e-4
    recipe_weight_decay: float = assume(0.01, "probe weight decay")
    folds: int = 5
    cross_validate_below: int = 100
    bootstrap_draws: int = 500

    def __post_init__(self) -> None:
        for name in self.tasks:
            find_task(name)
        require(len(self.seeds) > 0, "A probe must have at least one seed", self.seeds)
        require(self.folds >= 2, "A cross-validation must have at least 2 folds", self.folds)


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
            arguments[name] = _to_tuples(value)
    return kind(**arguments)


def _to_tuples(value: Any) -> Any:
    return tuple(_to_tuples(item) for item in value) if isinstance(value, list | tuple) else value


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
