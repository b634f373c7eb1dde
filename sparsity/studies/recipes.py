"""The settings in which networks are trained from scratch, each named once: data, network, recipe, steps between logs.

Experiment 03 trains the ViTs and 05 the T5s in all variants; 01, 08 and 31 take the ViTs too, and so find networks that
03 has trained in the cache. The paper scale has the authors' recipes (arXiv 2605.25612). At the smaller scales, which
last minutes, weight decay is larger, so that E = Σ learning rate × weight decay over the steps is large all the same.
"""

from dataclasses import replace

from common.training import TrainingRecipe
from sparsity.studies.images import IMAGENET, ImageTask
from sparsity.studies.span_corruption import SpanCorruption

ADAMW = (0.9, 0.999)  # β₁ and β₂, the defaults of AdamW, which the authors keep

# Vision Transformers: weight decay goes with the size of the network, and so it stands beside the recipes.
SMOKE_RECIPE = TrainingRecipe(6, 16, 3e-3, betas=ADAMW)
DIGITS_RECIPE = TrainingRecipe(2400, 16, 3e-3, warmup=0.07, betas=ADAMW)
GLYPHS_RECIPE = TrainingRecipe(5500, 32, 3e-3, warmup=0.036, betas=ADAMW)
IMAGENET_RECIPE = TrainingRecipe(187_500, 2048, 3e-3, warmup=0, betas=ADAMW, stairs=300, precision="fp16")
DIGITS_DECAY = 1.25
GLYPHS_DECAY = 0.48
LARGER_GLYPHS_DECAY = 0.96  # of width 96 and 6 layers
IMAGENET_DECAY = 0.3

VIT = {
    "smoke": dict(
        task=ImageTask("digits", width=16, depth=2),
        recipe=replace(SMOKE_RECIPE, weight_decay=DIGITS_DECAY),
        log_every=3,
    ),
    "laptop": dict(
        task=ImageTask("digits", width=64, depth=2),
        recipe=replace(DIGITS_RECIPE, weight_decay=DIGITS_DECAY),
        log_every=80,
    ),
    "workstation": dict(
        task=ImageTask("glyphs", width=64, depth=4),
        recipe=replace(GLYPHS_RECIPE, weight_decay=GLYPHS_DECAY),
        log_every=110,
    ),
    "paper": dict(
        task=IMAGENET,
        recipe=replace(IMAGENET_RECIPE, weight_decay=IMAGENET_DECAY),
        log_every=100,
    ),
}

# T5 on span corruption: half a cosine at a moderate rate, and the authors' inverse square root at a high one.
AUTHORS_T5 = dict(warmup=0.1, betas=ADAMW, schedule="inverse_sqrt")  # with a rate of 1e-2
T5 = {
    "smoke": dict(
        task=SpanCorruption(width=16, depth=1, heads=2, d_ff=32, megabytes=0.5, evaluation_rows=32),
        recipes=(TrainingRecipe(4, 4, 3e-3), TrainingRecipe(4, 4, 1e-2, schedule="inverse_sqrt")),
        log_every=2,
    ),
    "laptop": dict(
        task=SpanCorruption(depth=1),
        recipes=(
            TrainingRecipe(1200, 16, 3e-3, warmup=0.07, weight_decay=1.4, betas=ADAMW),
            TrainingRecipe(1200, 16, 1e-2, warmup=0.1, weight_decay=0.5, betas=ADAMW, schedule="inverse_sqrt"),
        ),
        log_every=50,
    ),
    "workstation": dict(
        task=SpanCorruption(depth=2),
        recipes=(
            TrainingRecipe(3000, 16, 3e-3, warmup=0.05, weight_decay=0.92, betas=ADAMW),
            TrainingRecipe(3000, 16, 1e-2, warmup=0.1, weight_decay=0.27, betas=ADAMW, schedule="inverse_sqrt"),
        ),
        log_every=100,
    ),
    "paper": dict(
        task=SpanCorruption("c4", length=512, model="google-t5/t5-base"),
        recipes=(
            TrainingRecipe(100_000, 256, 1e-2, warmup=0.1, weight_decay=1e-3, betas=ADAMW, schedule="inverse_sqrt"),
        ),
        log_every=50,
    ),
}

# The authors' schedule at their E = Σ learning rate × weight decay, which is 0.48 (smoke: less).
T5_AUTHORS_DECAY = {
    "smoke": dict(
        task=T5["smoke"]["task"], recipe=TrainingRecipe(4, 4, 1e-2, weight_decay=0.124, **AUTHORS_T5), log_every=2
    ),
    "laptop": dict(
        task=replace(T5["laptop"]["task"], evaluation_rows=256),
        recipe=TrainingRecipe(800, 16, 1e-2, weight_decay=0.124, **AUTHORS_T5),
        log_every=40,
    ),
    "workstation": dict(
        task=T5["workstation"]["task"],
        recipe=TrainingRecipe(3000, 16, 1e-2, weight_decay=0.033, **AUTHORS_T5),
        log_every=100,
    ),
    "paper": dict(task=T5["paper"]["task"], recipe=T5["paper"]["recipes"][0], log_every=50),
}
