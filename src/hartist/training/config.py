"""Settings of a training run, as recipes give them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hartist import config as configs
from hartist.errors import UserError
from hartist.scales import Side
from hartist.training.adversarial_config import AdversarialConfig


@dataclass(frozen=True)
class OptimizerConfig:
    kind: Literal["adamw", "muon"] = "adamw"
    """muon: hidden matrices and kernels by Muon, the rest by AdamW; most often fewer steps to the same loss."""
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 200
    final_fraction: float = 0.05
    """Learning rate at the last step, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass(frozen=True)
class RunConfig:
    steps: int = 1000
    batch_size: int = 32
    micro_batch: int = 0
    """Images a process takes at once; gradients accumulate over the parts of a batch. 0: the batch as a whole."""
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_every: int = 20
    picture_every: int = 500
    checkpoint_seconds: float = 180.0
    bf16: bool = True
    """Autocast convolutions and matrix products to bfloat16 where the hardware has it; quantizer, logits and
    losses stay float32."""
    compile: bool = False
    """Compile the networks' blocks with torch.compile; a tokenizer not on a CPU."""
    activation_checkpointing: bool = False
    """Recompute the transformer's blocks in the backward pass instead of keeping their activations."""

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.log_every, self.picture_every) < 1 or self.micro_batch < 0:
            raise UserError("steps, batch_size, log_every and picture_every are at least 1, micro_batch at least 0")
        if self.micro_batch and self.batch_size % self.micro_batch:
            raise UserError(f"a batch of {self.batch_size} has no equal parts of {self.micro_batch} images")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the run's result; how often it reports and saves does not."""
        values = configs.to_json(self)
        for name in ("log_every", "picture_every", "checkpoint_seconds"):
            del values[name]
        return values


@dataclass(frozen=True)
class TokenizerLossConfig:
    l1: float = 1.0
    l2: float = 1.0
    perceptual: float = 0.0
    perceptual_network: Literal["hed-vgg", "lpips"] = "hed-vgg"
    perceptual_crop: int = 64
    """Side of the random crop that the perceptual network sees; full images would cost more than the model."""
    perceptual_share: float = 1.0
    """Share of the batch that it sees."""
    quantizer: float = 1.0
    adversarial: float = 0.0
    """Weight of the adversarial loss, beside the adaptive one; 0 = none."""
    adversary: AdversarialConfig = field(default_factory=AdversarialConfig)
    hybrid_probability: float = 0.5
    """The paper's coin: how often the decoder sees f instead of f_hat."""
    frozen_encoder: bool = False
    """The published way: start from a discrete tokenizer; train only the decoder and `post_quant_conv`."""
    continuous_steps: int = 0
    """Steps at the start without quantizer; the codebook is then initialised from the latents."""
    discrete_steps: int = 0
    """Steps after that on the discrete path alone, before the coin is flipped."""
    revive_every: int = 100
    """Codes that no batch of so many steps has hit are moved onto latents; 0 = never."""

    def __post_init__(self) -> None:
        if self.frozen_encoder and self.continuous_steps:
            raise UserError("a frozen encoder has no continuous warm-up: set continuous_steps to 0")
        if not 0 <= self.hybrid_probability <= 1:
            raise UserError(f"hybrid_probability {self.hybrid_probability} is no probability; choose 0 to 1")


RELEASED_CONDITION_DROPOUT = 0.5398
"""What the authors' code does: it compares a normal, not a uniform, random number with 0.1."""


@dataclass(frozen=True)
class GeneratorLossConfig:
    residual: float = 1.0
    """Weight of the residual diffusion loss beside the cross-entropy."""
    condition_dropout: float = 0.1
    """How often a condition is replaced by the unconditional one; see RELEASED_CONDITION_DROPOUT."""
    subsample_last_scale: bool = True
    """Keep a random part of the last scale's cells, as published (paper section 3.3)."""
    drop_share: float | None = None
    """A fixed share of the last scale's cells to drop, instead of the published random one."""
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

    def __post_init__(self) -> None:
        for name in ("condition_dropout", "coarse_share", "coarse_until", "label_smoothing", "drop_share"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name} {value} is out of range; choose 0 to 1")


@dataclass(frozen=True)
class Phase:
    """A part of a generator's run at one resolution (paper section 3.2: 256 → 512 → 1024 with the same weights)."""

    image_size: int
    sides: tuple[Side, ...]
    share: float = 1.0
    """Of the run's steps."""
    batch_factor: int = 1
    """How many times the run's batch size: small images come in larger batches."""
    scales: int = 0
    """See the first so many scales only; 0 = all. What a prompt decides lies in the coarse ones, and they are cheap."""
