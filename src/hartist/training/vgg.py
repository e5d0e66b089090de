"""VGG-16 convolutions as a perceptual trunk: block after block, features between"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def block_features(
    x: Float[Tensor, "b c h w"], convs: Iterable[nn.Module], counts: Iterable[int]
) -> Iterator[Float[Tensor, "b _c _h _w"]]:
    """After every block of `counts` convolutions its ReLU features of unit length per cell (float32); pooling between.

    Cells without any feature stay zero.
    """
    remaining = iter(convs)
    for block, count in enumerate(counts):
        if block:
            x = F.max_pool2d(x, 2)
        for _ in range(count):
            x = F.relu(next(remaining)(x))
        yield F.normalize(x.float(), dim=1, eps=1e-10)
