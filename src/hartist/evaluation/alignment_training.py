"""Training the alignment heads on captioned pictures, all but the families they are to measure (see `alignment`)"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import trange

from hartist.data.folder import CaptionedImage
from hartist.errors import UserError
from hartist.evaluation.alignment import Alignment, AlignmentConfig, AlignmentHeads, text_vectors
from hartist.evaluation.features import FeatureNetwork, feature_cache, image_features
from hartist.evaluation.retrieval import Retrieval, distinct, retrieve
from hartist.evaluation.selection import family, read_pictures
from hartist.text.encoder import TextEncoder
from hartist.training.config import OptimizerConfig
from hartist.training.optimizer import build_optimizer, learning_rate

STEPS, BATCH = 600, 512
MAX_SCALE = 100.0


@dataclass(frozen=True)
class Pairs:
    """N pictures, U different texts, and who says what of whom."""

    images_ND: Float[Tensor, "n d"]
    texts_UT: Float[Tensor, "u t"]
    captions_M: Int[Tensor, " m"]
    """Rows of `texts_UT`: the captions of the first picture, then those of the second, …"""
    count_N: Int[Tensor, " n"]
    """How many of them belong to each picture."""

    def fingerprint(self) -> str:
        """Changes with any picture, text or pairing."""
        state = hashlib.sha256()
        for tensor in (self.images_ND, self.texts_UT, self.captions_M, self.count_N):
            state.update(str(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
        return state.hexdigest()[:16]


def contrastive_loss(
    images_BE: Float[Tensor, "b e"],
    texts_BE: Float[Tensor, "b e"],
    scale: Float[Tensor, ""],
    same_BB: Bool[Tensor, "b b"],
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: cross-entropy of each picture choosing its text in the batch, and each text its picture.

    Where `same_BB` says that two rows have one text, neither counts as wrong for the other.
    """
    logits_BB = scale * images_BE @ texts_BE.T
    own_B = torch.arange(len(images_BE))
    logits_BB = logits_BB.masked_fill(same_BB & ~torch.eye(len(own_B), dtype=torch.bool), -torch.inf)
    return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2


def train_heads(
    pairs: Pairs, config: AlignmentConfig, *, steps: int, batch_size: int, seed: int = 0, progress: bool = True
) -> AlignmentHeads:
    """Heads trained on random pictures with a random caption each; the same seed gives the same heads.

    Raises UserError for fewer than 2 pictures.
    """
    count = len(pairs.images_ND)
    if count < 2:
        raise UserError(f"the heads need at least 2 pictures to train on, there are {count}; add pictures")
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.manual_seed(seed)
        heads = AlignmentHeads(config).train()
        settings = OptimizerConfig(learning_rate=1e-3, warmup_steps=min(50, steps // 4), weight_decay=0.1)
        optimizer = build_optimizer(heads, settings)
        first_N = pairs.count_N.cumsum(0) - pairs.count_N
        for step in trange(steps, desc="alignment", unit="step", disable=not progress):
            picks_B = torch.randperm(count)[:batch_size]
            caption_B = first_N[picks_B] + (torch.rand(len(picks_B)) * pairs.count_N[picks_B]).long()
            text_B = pairs.captions_M[caption_B]
            loss = contrastive_loss(
                heads.embed_images(pairs.images_ND[picks_B]),
                heads.embed_texts(pairs.texts_UT[text_B]),
                heads.log_scale.exp().clamp(max=MAX_SCALE),
                text_B[:, None] == text_B,
            )
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, settings)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return heads.eval().requires_grad_(False)


def train_alignment(
    rows: Sequence[CaptionedImage],
    network: FeatureNetwork,
    encoder: TextEncoder,
    *,
    image_size: int,
    cache: Path,
    steps: int = STEPS,
    seed: int = 0,
    progress: bool = True,
) -> Alignment:
    """Heads for the pictures of `rows`, read at `image_size` px; features are kept in the folder `cache`.

    Raises UserError for fewer than two pictures, or broken ones.
    """
    images_ND = real_features(rows, network, image_size, cache, progress=progress)
    captions = [caption for row in rows for caption in row.captions]
    texts, captions_M = distinct(captions)
    texts_UT = text_vectors(encoder, texts, cache, progress=progress)
    pairs = Pairs(images_ND, texts_UT, captions_M, torch.tensor([len(row.captions) for row in rows]))
    config = AlignmentConfig(
        image_dim=images_ND.shape[1],
        text_dim=texts_UT.shape[1],
        image_network=network.key,
        text_encoder=encoder.fingerprint(),
        image_size=image_size,
        data=pairs.fingerprint(),
        families=tuple(sorted({family(row) for row in rows})),
    )
    heads = train_heads(pairs, config, steps=steps, batch_size=BATCH, seed=seed, progress=progress)
    return Alignment(heads, config, network, encoder, cache)


def real_features(
    rows: Sequence[CaptionedImage], network: FeatureNetwork, size: int, cache: Path, *, progress: bool
) -> Float[Tensor, "n d"]:
    """Features of real pictures, computed once."""
    pictures = read_pictures(rows, (size, size))
    cached = feature_cache(network, cache)
    return image_features(network, pictures, total=len(rows), cache=cached, progress=progress)


def agreement_of_real(alignment: Alignment, rows: Sequence[CaptionedImage], *, progress: bool = True) -> Retrieval:
    """How well real pictures that the heads have not seen find their captions: what the heads are worth."""
    config = alignment.config
    assert alignment.cache is not None
    features = real_features(rows, alignment.network, config.image_size, alignment.cache, progress=progress)
    texts, own_N = distinct([row.text for row in rows])
    return retrieve(alignment.embed_images(features), alignment.embed_texts(texts, progress=progress), own_N)
