"""The PatchGAN discriminator of the released tokenizer checkpoints"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from hartist.checkpoint import build_empty, check_keys, read_safetensors, read_weights
from hartist.errors import UserError
from hartist.interop.pickled import read_pickled

PREFIX = "disc."


class PatchDiscriminator(nn.Module):
    """pix2pix's patch discriminator (Isola et al. 2017, section 6.1.2), as VQGAN and HART use it.

    4×4 convolutions, all but the last two with stride 2, BatchNorm on all but the first and the last: with
    three layers a logit judges 70×70 pixels. Names and shapes are the released ones (there with 64 channels
    and three layers). In training mode an image's logits depend on the other images of its batch.
    """

    scales = 1

    def __init__(self, channels: int = 32, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for i in range(1, layers + 1):
            wider = channels * min(2**i, 8)
            stride = 2 if i < layers else 1
            blocks += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        blocks.append(nn.Conv2d(width, 1, 4, padding=1))
        self.main = nn.Sequential(*blocks)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 _h _w"]:
        return self.main(image)


def load_released_discriminator(tensors: Mapping[str, Tensor], where: str) -> PatchDiscriminator:
    """The discriminator beside a released tokenizer (keys `disc.main.…`), float32, ready to be trained on.

    Its sizes are read off the tensors. Raises UserError naming `where` if they hold none, or one of another kind.
    """
    marked = {key.removeprefix("module."): tensor for key, tensor in tensors.items()}
    found = {key.removeprefix(PREFIX): tensor for key, tensor in marked.items() if key.startswith(PREFIX)}
    first = found.get("main.0.weight")
    layers = sum(key.endswith(".running_mean") for key in found)
    if first is None or first.ndim != 4 or not layers:
        raise UserError(
            f"{where} holds no complete PatchGAN discriminator with BatchNorm (keys {PREFIX}main.…); "
            "start with a fresh discriminator"
        )
    channels = first.shape[0]
    check_keys(build_empty(lambda: PatchDiscriminator(channels, layers), where).state_dict(), found, where)
    discriminator = PatchDiscriminator(channels, layers)
    discriminator.load_state_dict(found)
    return discriminator


def read_released_discriminator(path: Path) -> PatchDiscriminator:
    """The same from disk: a released tokenizer's folder, the release's, or a file (`.safetensors`, `.pth`, `.bin`)."""
    if path.is_file() and path.suffix != ".safetensors":
        tensors = read_pickled(path, ("trainer", "vae_local"))
    elif path.is_file():
        tensors = read_safetensors(path)
    else:
        tensors = read_weights(path / "tokenizer" if (path / "tokenizer").is_dir() else path)
    return load_released_discriminator(tensors, str(path))
