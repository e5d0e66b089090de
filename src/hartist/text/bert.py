"""BERT's encoder (Devlin et al. 2018) as MiniLM has it: token ids → last hidden states

`transformers` has the same network, held to this one by a test; importing it takes longer than making a picture.
Parameter names are its names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hartist.errors import UserError


@dataclass(frozen=True)
class BertSizes:
    """The entries of a BERT's config.json that decide its shape."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        """Raises UserError for sizes below 1, and a width that the heads can't share."""
        for name in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")


class Embeddings(nn.Module):
    """Word, position and segment (always the first) together, normalised."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.word_embeddings = nn.Embedding(sizes.vocab_size, width)
        self.position_embeddings = nn.Embedding(sizes.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(sizes.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=sizes.layer_norm_eps)

    def forward(self, ids_BS: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        position_SD = self.position_embeddings.weight[: ids_BS.shape[1]]
        x_BSD = self.word_embeddings(ids_BS) + self.token_type_embeddings.weight[0] + position_SD
        return self.LayerNorm(x_BSD)


class SelfAttention(nn.Module):
    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        width = sizes.hidden_size
        self.heads = sizes.num_attention_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x_BSD: Float[Tensor, "b s d"], bias_B11S: Float[Tensor, "b 1 1 s"]) -> Float[Tensor, "b s d"]:
        q_BNSE, k_BNSE, v_BNSE = (
            part(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores_BNSS = q_BNSE @ k_BNSE.mT / math.sqrt(q_BNSE.shape[-1]) + bias_B11S
        return (scores_BNSS.softmax(-1) @ v_BNSE).transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A projection, added to what came in, normalised."""

    def __init__(self, width_in: int, width: int, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def forward(self, y: Float[Tensor, "b s _h"], x_BSD: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        return self.LayerNorm(self.dense(y) + x_BSD)


class Layer(nn.Module):
    """Attention, then a feed-forward part with exact GELU, each normalised after its residual."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        width, hidden, eps = sizes.hidden_size, sizes.intermediate_size, sizes.layer_norm_eps
        self.attention = nn.ModuleDict({"self": SelfAttention(sizes), "output": Output(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = Output(hidden, width, eps)

    def forward(self, x_BSD: Float[Tensor, "b s d"], bias_B11S: Float[Tensor, "b 1 1 s"]) -> Float[Tensor, "b s d"]:
        x_BSD = self.attention["output"](self.attention["self"](x_BSD, bias_B11S), x_BSD)
        return self.output(F.gelu(self.intermediate["dense"](x_BSD)), x_BSD)


class Bert(nn.Module):
    """Without pooler."""

    def __init__(self, sizes: BertSizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})

    def forward(self, ids_BS: Int[Tensor, "b s"], mask_BS: Bool[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        """The last hidden states; tokens outside the mask are not attended to."""
        x_BSD = self.embeddings(ids_BS)
        lowest = torch.finfo(x_BSD.dtype).min
        bias_B11S = torch.zeros_like(mask_BS, dtype=x_BSD.dtype).masked_fill(~mask_BS, lowest)[:, None, None]
        for layer in self.encoder["layer"].children():
            x_BSD = layer(x_BSD, bias_B11S)
        return x_BSD
