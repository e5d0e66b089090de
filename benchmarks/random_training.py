"""Generator training on random tokens: speed does not depend on what tokens, captions and weights say"""

from __future__ import annotations

import torch

from hartist.config import TokenizerConfig, TransformerConfig
from hartist.generation.checkpoint import LoadedModel
from hartist.tokenizer.hybrid import HybridTokenizer, fast_layout
from hartist.training.config import GeneratorLossConfig, RunConfig
from hartist.training.generator_stage import GeneratorStage, TrainingPhase
from hartist.training.loop import Trainer
from hartist.training.parallel import World
from hartist.training.token_shards import Texts, TextTable, TokenCache
from hartist.transformer.model import ScaleTransformer

BATCHES = 4
"""Different batches of images in the cache."""


def random_cache(images: int, config: TransformerConfig) -> TokenCache:
    """A cache in memory: one caption of full length an image, or for a class model one label."""
    text = config.condition == "text"
    captions = images if text else 0
    schedule = config.schedule
    texts = Texts(
        torch.randn(captions, config.context_tokens, config.context_dim).half(),
        torch.ones(captions, config.context_tokens, dtype=torch.bool),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(captions, dtype=torch.long),
    )
    return TokenCache(
        torch.randint(config.vocab_size, (images, schedule.num_tokens), dtype=torch.int16),
        torch.randn(images, schedule.lengths[-1], config.latent_channels).half(),
        torch.arange(captions),
        torch.arange(images) if text else torch.zeros(images, dtype=torch.long),
        torch.full((images,), int(text)),
        TextTable((texts,)),
        None if text else torch.randint(config.num_classes, (images,)),
    )


def random_trainer(
    tokenizer_config: TokenizerConfig, config: TransformerConfig, losses: GeneratorLossConfig, run: RunConfig
) -> tuple[Trainer, TokenCache]:
    """The trainer of the loop with random networks, in the state of a run's first step; and its token cache."""
    torch.manual_seed(run.seed)
    tokenizer = fast_layout(HybridTokenizer(tokenizer_config)).requires_grad_(False).eval()
    transformer = ScaleTransformer(config)
    transformer.initialise()
    cache = random_cache(BATCHES * run.batch_size, config)
    schedule = config.schedule
    phase = TrainingPhase(
        first_step=0,
        batch_size=run.batch_size,
        schedule=schedule,
        scales=len(schedule),
        cache=cache,
        validation=cache,
    )
    model = LoadedModel(tokenizer, transformer, None, "random")
    return Trainer(GeneratorStage(losses, run, [phase], model, "random"), run, World(), "ddp"), cache
