"""Eight-bit matrix products of the transformer's blocks on a CPU, by the oneDNN kernels that PyTorch brings

Weights are rounded once, with a step for every output; activations as they come, with a step for every token: so no
token's rounding depends on another's, and an image not on its batch. Sums are integers, hence exact in any order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hartist.errors import UserError
from hartist.transformer.model import ScaleTransformer

TINY = 1e-12


class Int8Linear(nn.Module):
    """x·Wᵀ + b with W and x in eight bits, float in and out. Inference only, and it can't be saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_OI = linear.weight.detach().float()
        self.step_O = (weight_OI.abs().amax(1) / 127).clamp(min=TINY)
        self.zeros_O = torch.zeros(len(weight_OI), dtype=torch.int32)
        rounded_OI = (weight_OI / self.step_O[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(rounded_OI, None)
        self.bias = linear.bias.detach().float() if linear.bias is not None else None
        # Without VNNI, kernels sum pairs of products in 16 bits, which seven-bit activations do not overflow.
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        x_RI = x.reshape(-1, x.shape[-1]).float()
        step_R1 = x_RI.abs().amax(1, keepdim=True).clamp(min=TINY) / self.levels
        # Activations are unsigned to these kernels: zero lies at `levels` + 1. Truncation of what is positive rounds.
        rounded_RI = torch.addcdiv(x_RI.new_tensor(self.levels + 1.5), x_RI, step_R1).to(torch.uint8)
        y_RO = torch.ops.onednn.qlinear_pointwise(
            rounded_RI,
            1.0,
            self.levels + 1,
            self.packed,
            self.step_O,
            self.zeros_O,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        ).mul_(step_R1)
        if self.bias is not None:
            y_RO += self.bias
        return y_RO.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_int8(model: ScaleTransformer) -> ScaleTransformer:
    """Put `Int8Linear` in place of every linear layer of the blocks' attention and feed-forward parts.

    Raises UserError for a model that is not on a CPU, or a PyTorch without the kernels.
    """
    if model.word_embed.weight.device.type != "cpu":
        raise UserError("int8 works on a CPU only; leave --int8 out, or add --device cpu")
    if not torch.backends.mkldnn.is_available():
        raise UserError("this PyTorch has no eight-bit kernels (oneDNN); leave --int8 out")
    for block in model.blocks:
        for part in (block.attn, block.mlp):
            assert isinstance(part, nn.Module)
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(part, name, Int8Linear(layer))
    return model
