"""Settings of a training run, as recipes give them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    final_fraction: float = 0.05
    """Learning rate at the last step, as a share of the peak (cosine in between)."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass(frozen=True)
class RunConfig:
    steps: int = 1000
    batch_size: int = 32
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = 20
    picture_every: int = 500
    checkpoint_seconds: float = 180.0
    bf16: bool = True
    """Autocast convolutions and matrix products to bfloat16; quantizer, logits and losses stay float32."""


@dataclass(frozen=True)
class TokenizerLossConfig:
    l1: float = 1.0
    l2: float = 1.0
    perceptual: float = 0.0
    perceptual_crop: int = 64
    """Side of the random crop that the perceptual network sees; full images would cost more than the model."""
    perceptual_share: float = 1.0
    """Share of the batch that it sees."""
    quantizer: float = 1.0
    adversarial: float = 0.0
    adversarial_start: float = 0.2
    """Share of the run after which the discriminator joins in."""
    hybrid_probability: float = 0.5
    """The paper's coin: how often the decoder sees f instead of f_hat."""
    continuous_steps: int = 0
    """Steps at the start without quantizer; the codebook is then initialised from the latents."""
    revive_every: int = 100
    """Codes that no batch of so many steps has hit are moved onto latents; 0 = never."""


@dataclass(frozen=True)
class GeneratorLossConfig:
    residual: float = 1.0
    """Weight of the residual diffusion loss beside the cross-entropy."""
    condition_dropout: float = 0.1
    subsample_last_scale: bool = True
    """Keep a random part of the last scale's cells, as published (paper section 3.3)."""
    coarse_share: float = 0.0
    """Share of the steps that see the coarse scales only, without the last `coarse_dropped`: what a prompt
    decides lies there, and such a step costs a fraction of a full one."""
    coarse_dropped: int = 2
    coarse_until: float = 1.0
    """Share of the run after which every step is a full one."""
    diffusion_repeats: int = 4
    """Independent diffusion times drawn for every residual token."""
    label_smoothing: float = 0.0
    scale_weight_power: float = 0.0
    """Tokens of a scale with l tokens weigh l^−power: 0 is plain cross-entropy, ½ favours the coarse scales."""
