"""The recipe for going on with a finished model on a folder of one's own pictures"""

from __future__ import annotations

from hartist.errors import UserError
from hartist.generation.checkpoint import LoadedModel
from hartist.training.config import GeneratorLossConfig, OptimizerConfig, Phase, RunConfig
from hartist.training.recipe import GeneratorRecipe


def finetune_recipe(model: LoadedModel) -> GeneratorRecipe:
    """Made for some dozens of pictures and for minutes on two CPU cores: few steps, a small constant-then-falling
    rate, and an average that follows closely. Raises UserError if the model has no text encoder."""
    if model.text_encoder is None:
        raise UserError(f"the model {model.name!r} is class-conditional; fine-tuning takes a text-conditional model")
    config = model.transformer.config
    side = model.tokenizer.config.downsampling * model.transformer.schedule.finest[0]
    return GeneratorRecipe(
        name=f"{model.name}-finetuned",
        phases=(Phase(side, config.sides),),
        transformer=config,
        losses=GeneratorLossConfig(diffusion_repeats=2, scale_weight_power=0.5),
        run=RunConfig(
            steps=150,
            batch_size=16,
            optimizer=OptimizerConfig(
                learning_rate=3e-4, schedule="wsd", warmup_steps=20, weight_decay=0.0, ema_decay=0.98
            ),
            picture_every=50,
        ),
        sampling=model.settings,
    )
