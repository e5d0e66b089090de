"""The scale-wise transformer: context and scales → hidden states and logits (paper section 3.2).

Text models put S context tokens first, class models the start tokens; each run of tokens after that
is one scale. `prepare` turns a condition into what every scale needs of it, `forward_scale` is one
autoregressive step with a cache, `forward_all` the teacher-forced pass over all scales at once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hartist.config import TransformerConfig
from hartist.errors import UserError
from hartist.layers import Linear, SinusoidalEmbedder
from hartist.residual.mlp import ResidualMLP
from hartist.scales import ScaleSchedule
from hartist.text.encoder import TextContext
from hartist.transformer.block_causal import Runs
from hartist.transformer.blocks import Block, Head, Modulation, RMSNorm
from hartist.transformer.cache import KVCache, Spans
from hartist.transformer.positions import Rope, cell_coordinates, rope_image, rope_text


@dataclass(frozen=True)
class Condition:
    """A condition, computed once for all scales."""

    prefix_BSD: Float[Tensor, "b s d"]
    """Context or start tokens with their position and step embeddings."""
    prefix_rope: Rope | None
    offset_B: Int[Tensor, " b"]
    """What the image cells' coordinates start from."""
    head_BD: Float[Tensor, "b d"]
    modulations: tuple[Float[Tensor, "b 6 d"] | None, ...]
    """γ1 γ2 s1 s2 b1 b2 of every block."""

    def select(self, rows: list[int]) -> Condition:
        """The condition of these rows, in this order; the prefix is left out, as its keys are in the cache."""
        modulations = tuple(None if m_B6D is None else m_B6D[rows] for m_B6D in self.modulations)
        return Condition(self.prefix_BSD[rows], None, self.offset_B[rows], self.head_BD[rows], modulations)


@dataclass(frozen=True)
class TeacherForced:
    """Hidden states of a teacher-forced pass, without the context tokens that predict nothing."""

    hidden_BTD: Float[Tensor, "b t d"]
    """From the last prefix token (text) or all start tokens (class) to the last kept cell."""
    last_scale_BmD: Float[Tensor, "b m d"]
    """The kept cells of the last scale."""


class ScaleTransformer(nn.Module):
    """Text- or class-conditional; with the residual diffusion MLP unless `config.residual` is None."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        self.activation_checkpointing = False
        width = config.width
        self.word_embed = Linear(config.latent_channels, width)
        if config.condition == "text":
            self.context_norm = (
                RMSNorm(config.context_dim, config.norm_eps, config.context_norm_scale)
                if config.context_norm
                else nn.Identity()
            )
            self.context_embed = Linear(config.context_dim, width)
        else:
            self.class_embed = nn.Embedding(config.num_classes + 1, width)
        if config.positions == "absolute":
            tokens = config.prefix_tokens + self.schedule.num_tokens - self.schedule.lengths[0]
            self.start_position = nn.Parameter(torch.empty(1, config.prefix_tokens, width))
            self.position_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.step_embed: nn.Module = (
            SinusoidalEmbedder(width)
            if config.step_embedding == "sinusoidal"
            else nn.Embedding(len(self.schedule), width)
        )
        if config.modulation == "shared_adaln":
            self.shared_modulation = Linear(width, 6 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head = Head(config)
        if config.residual is not None:
            self.residual_norm: nn.Module = (
                RMSNorm(width, config.norm_eps) if config.norm == "rms" else nn.LayerNorm(width, eps=config.norm_eps)
            )
            self.residual_mlp = ResidualMLP(config.residual, config.latent_channels, width)

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embed.weight.dtype

    def use_schedule(self, schedule: ScaleSchedule) -> None:
        """Go on with other scales: the same weights at another resolution (paper section 3.2).

        Raises UserError where weights belong to positions or scales that the schedule has more of.
        """
        if self.config.positions == "absolute" and schedule != self.config.schedule:
            raise UserError("a model with absolute positions has one resolution; relative ones (rope) carry over")
        if self.config.step_embedding == "table" and len(schedule) > len(self.config.sides):
            raise UserError(
                f"the step embedding's table has {len(self.config.sides)} scales, the schedule {len(schedule)}; "
                "a sinusoidal one has no limit"
            )
        self.schedule = schedule

    def initialise(self) -> None:
        """Initial weights for training, from torch's global generator."""
        from hartist.transformer.initialise import initialise_weights

        initialise_weights(self)

    def new_cache(self, batch: int) -> KVCache:
        """An empty cache with room for the prefix and all scales but the last."""
        capacity = self.config.prefix_tokens + sum(self.schedule.lengths[1:-1])
        weight = self.word_embed.weight
        return KVCache(
            self.config.depth, batch, self.config.heads, capacity, self.config.head_dim, weight.dtype, weight.device
        )

    # ----------------------------------------------------------------- conditions

    def prepare(self, condition: TextContext | Int[Tensor, " b"]) -> Condition:
        """What the scales need of a text context or of class labels (`num_classes` = unconditional)."""
        if isinstance(condition, TextContext):
            embedded_BSD = self.context_embed(self.context_norm(condition.states_BSC.to(self.dtype)))
            head_BD = embedded_BSD.amax(1)
            block_BD = head_BD
            if self.config.modulation == "table" or self.config.pooling == "mean":
                block_BD = _masked_mean(embedded_BSD, condition.mask_BS)
            offset_B = condition.position_ids_BS[:, -1]
        else:
            head_BD = block_BD = self.class_embed(condition)
            embedded_BSD = head_BD[:, None].expand(-1, self.config.prefix_tokens, -1)
            offset_B = torch.zeros_like(condition)
        prefix_BSD = embedded_BSD + self._step(0)
        rope = None
        if self.config.positions == "absolute":
            prefix_BSD = prefix_BSD + self.start_position + self.position_embed[:, : self.config.prefix_tokens]
        elif isinstance(condition, TextContext):
            rope = rope_text(condition.position_ids_BS, self.config.head_dim).to(self.dtype)
        else:
            rope = self._scale_rope(0, offset_B)
        return Condition(prefix_BSD, rope, offset_B, head_BD, self._modulations(block_BD))

    def _modulations(self, condition_BD: Tensor) -> tuple[Tensor | None, ...]:
        if self.config.modulation == "shared_adaln":
            condition_BD = self.shared_modulation(nn.functional.silu(condition_BD))
        return tuple(
            block.modulation(condition_BD) if isinstance(block.modulation, Modulation) else None
            for block in self.blocks
        )

    def _step(self, k: int) -> Float[Tensor, "1 d"]:
        """The step embedding of scale k; the context shares index 0 with scale 1."""
        return self.step_embed(torch.tensor([k], device=self.word_embed.weight.device))

    def _scale_rope(self, k: int, offset_B: Tensor) -> Rope | None:
        if self.config.positions != "rope":
            return None
        coordinates = cell_coordinates(self.schedule, k, offset_B.device)
        return rope_image(coordinates, offset_B, self.config.head_dim, self.config.rope).to(self.dtype)

    def _scale_start(self, k: int) -> int:
        """Index in the sequence of the first token of scale k ≥ 1 (0-based; scale 0 is the prefix)."""
        return self.config.prefix_tokens + sum(self.schedule.lengths[1:k])

    def _embed_scale(self, k: int, input_BlC: Tensor) -> Tensor:
        x_BlD = self.word_embed(input_BlC.to(self.dtype)) + self._step(k)
        if self.config.positions == "absolute":
            start = self._scale_start(k)
            x_BlD = x_BlD + self.position_embed[:, start : start + self.schedule.lengths[k]]
        return x_BlD

    def _scales_within(self, tokens: int) -> list[int]:
        """Lengths of the scales 2, 3, … that together have so many tokens."""
        lengths: list[int] = []
        for length in self.schedule.lengths[1:]:
            if sum(lengths) >= tokens:
                break
            lengths.append(length)
        return lengths

    # ----------------------------------------------------------------- forward passes

    def forward_scale(
        self,
        k: int,
        input_BlC: Float[Tensor, "b l c"] | None,
        condition: Condition,
        cache: KVCache,
        *,
        spans: Spans | None = None,
        kept_Bm: Int[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b m d"]:
        """One autoregressive step: hidden states of scale k's cells; `input_BlC` is None for k = 0.

        The input is f_hat so far, area-downsampled to the scale's grid. For k = 0 the prefix runs, and
        its last l_1 tokens are returned. `spans`: the cached keys to attend to, instead of all. `kept_Bm`: the cells
        of the last scale to compute, as training with token subsampling sees them (paper section 3.3).
        """
        if input_BlC is None:
            x_BlD, rope = condition.prefix_BSD, condition.prefix_rope
        else:
            x_BlD, rope = self._embed_scale(k, input_BlC), self._scale_rope(k, condition.offset_B)
            if kept_Bm is not None:
                x_BlD, rope = _keep_cells(x_BlD, rope, kept_Bm)
        keep = not self.schedule.is_last(k)
        for layer, block in enumerate(self.blocks):
            x_BlD = block(x_BlD, condition.modulations[layer], rope, cache=cache, layer=layer, keep=keep, spans=spans)
        return x_BlD[:, -self.schedule.lengths[k] :]

    def forward_all(
        self,
        input_BLC: Float[Tensor, "b l c"],
        condition: Condition,
        kept_Bm: Int[Tensor, "b m"] | None = None,
    ) -> TeacherForced:
        """The teacher-forced pass: inputs of scales 2..K side by side, block-causal attention.

        `kept_Bm` keeps only these cells of the last scale (paper section 3.3); they keep their own
        coordinates and see each other and all earlier scales. Inputs may end after any scale: then the
        pass does too.
        """
        lengths = self._scales_within(input_BLC.shape[1])
        x = [condition.prefix_BSD]
        ropes = [condition.prefix_rope]
        for k, scale_input_BlC in enumerate(input_BLC.split(lengths, 1), start=1):
            x_BlD = self._embed_scale(k, scale_input_BlC)
            rope = self._scale_rope(k, condition.offset_B)
            if kept_Bm is not None and self.schedule.is_last(k):
                x_BlD, rope = _keep_cells(x_BlD, rope, kept_Bm)
            x.append(x_BlD)
            ropes.append(rope)
        x_BTD = torch.cat(x, 1)
        rope = Rope.cat([r for r in ropes if r is not None]) if ropes[0] is not None else None
        runs = Runs(tuple(part.shape[1] for part in x))
        for layer, block in enumerate(self.blocks):
            call = functools.partial(block, x_BTD, condition.modulations[layer], rope, runs=runs)
            keep = not (self.activation_checkpointing and torch.is_grad_enabled())
            x_BTD = call() if keep else checkpoint(call, use_reentrant=False)
        first = self.config.prefix_tokens - self.schedule.lengths[0]
        last = x[-1].shape[1] if len(x) > 1 else self.schedule.lengths[0]
        return TeacherForced(x_BTD[:, first:], x_BTD[:, x_BTD.shape[1] - last :])

    def logits(self, hidden_BlD: Float[Tensor, "b l d"], condition: Condition) -> Float[Tensor, "b l v"]:
        """float32 logits over the codes."""
        return self.head(hidden_BlD, condition.head_BD)

    def residual_condition(
        self, hidden_BlD: Float[Tensor, "b l d"], code_BlC: Float[Tensor, "b l c"]
    ) -> Float[Tensor, "b l d"]:
        """The residual MLP's condition: norm(hidden + word_embed(chosen code)) (paper section 3.2)."""
        return self.residual_norm(hidden_BlD + self.word_embed(code_BlC.to(self.dtype)))


def _keep_cells(x_BlD: Tensor, rope: Rope | None, kept_Bm: Tensor) -> tuple[Tensor, Rope | None]:
    x_BmD = torch.take_along_dim(x_BlD, kept_Bm[..., None], 1)
    return x_BmD, rope.select(kept_Bm) if rope is not None else None


def _masked_mean(x_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    weight_BS1 = mask_BS.to(x_BSD.dtype)[..., None]
    return (x_BSD * weight_BS1).sum(1) / weight_BS1.sum(1).clamp(min=1)
