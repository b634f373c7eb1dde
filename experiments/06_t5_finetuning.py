"""Fine-tuning language models for activation sparsity: a vanilla T5, and MiniLM, a network that others have trained.

Arms, controls, rivals and the density at equal accuracy are those of experiment 04. The T5 was trained by the authors'
schedule at the authors' E = Σ rate × weight decay, and is fine-tuned on span corruption at the authors' E, and at
workstation scale at 4 too.
MiniLM has GELU, which is mixed into ReLU or JSReLU while the network learns, by LoRA, to give the states that it gave
before; its norms stand after the residual, which reads them too, so that they cannot be folded into keys. Equal
accuracy allows, against vanilla without thresholds on validation data, 0.02 nats a token more in T5, and 0.01 more of
1 − cosine between MiniLM's states and the original's. T5's learning rate (1e-2 or 3e-3) was chosen on validation data,
with a seed of its own, where a penalty of 0.003 changed nothing; MiniLM's settings are the first that were tried.

Claim    the plug-ins make a trained vanilla network sparser (C4, T5-Base, LoRA; no figure is known to us).
Verdict  on every setting with at least 3 seeds (none: "not run at this scale"), from 95 % intervals of the relative
         change of test density, paired by seed. "sparser, also at equal accuracy" if modified lies below vanilla as a
         whole interval, with thresholds at equal accuracy too, which every run has to reach; "sparser, but not
         certainly at equal accuracy" if only without; else "not certainly sparser". Of any two arms: "sparser" or
         "denser" where the interval lies on one side of 0, "equal" where it lies within ±10 %, else "undecided";
         modified against norms lifted alone says whether anything beyond the lift acts, norms folded against vanilla
         whether |w| = 1 acts by itself, and modified against the strongest penalty, at equal accuracy, which to take.
Cost     smoke 40 s; laptop 5 min (T5 at E 0.05); workstation 4 h; paper: 1e4 steps of 256 × 512 tokens a run.
Run      python experiments/06_t5_finetuning.py --scale laptop
"""

from dataclasses import dataclass, replace
from functools import partial

from common.lab.run import Experiment, run
from common.training import TrainingRecipe
from sparsity.plugins import PROTOCOLS
from sparsity.studies import finetuning, finetuning_tables
from sparsity.studies.distillation import Distillation
from sparsity.studies.equal_accuracy import KEPT, T5_MARGIN
from sparsity.studies.recipes import ADAMW, AUTHORS_T5, T5, T5_AUTHORS_DECAY
from sparsity.studies.runs import COMMON_DEVIATIONS, FineTuning, Run
from sparsity.studies.span_corruption import SpanCorruption

MARGINS = {"T5": T5_MARGIN, "MiniLM": 0.01}  # of the losses: nats a token, and 1 − cosine


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0, 1, 2)  # of the vanilla networks, and of what starts from them
    arms: tuple[str, ...] = ("vanilla", "modified", finetuning.LIFTED, finetuning.FOLDED)  # of T5
    task: SpanCorruption = replace(T5["laptop"]["task"], evaluation_rows=256)
    # of the vanilla T5, with E = 0.48 as in the authors' recipe; None: a pretrained one
    start: TrainingRecipe | None = TrainingRecipe(1200, 16, 1e-2, weight_decay=0.083, **AUTHORS_T5)
    recipe: TrainingRecipe = TrainingRecipe(300, 16, 1e-2, **AUTHORS_T5)
    weight_decays: tuple[float, ...] = (0.034,)  # E = 0.05 as in the authors' recipe; at workstation scale 4 too
    rank: int = 16
    alpha: float = 1.0
    l1: tuple[float, ...] = (0.1,)  # weights of the penalty, in the first setting of T5
    minilm: Distillation | None = None  # five minutes a run on one core, and so from workstation scale on
    minilm_recipe: TrainingRecipe = TrainingRecipe(120, 16, 1e-3, weight_decay=0.01, betas=ADAMW)
    minilm_rank: int = 16
    minilm_alpha: float = 32.0
    minilm_arms: tuple[str, ...] = ("vanilla", "modified")
    minilm_l1: tuple[float, ...] = ()
    log_every: int = 50
    kept: tuple[float, ...] = KEPT  # thresholds of density at equal accuracy: shares of activations kept


SCALES = {
    "smoke": Settings(
        seeds=(0,),
        task=T5["smoke"]["task"],
        start=TrainingRecipe(4, 4, 1e-2, **AUTHORS_T5),
        recipe=TrainingRecipe(4, 4, 1e-2, **AUTHORS_T5),
        weight_decays=(0.017,),
        rank=4,
        l1=(0.03,),
        minilm=Distillation(length=16, megabytes=0.1, evaluation_rows=8),
        minilm_recipe=TrainingRecipe(2, 4, 1e-3, betas=ADAMW),
        minilm_rank=4,
        log_every=2,
        kept=(1.0, 0.5),
    ),
    "laptop": Settings(),
    "workstation": Settings(
        task=T5["workstation"]["task"],
        start=T5_AUTHORS_DECAY["workstation"]["recipe"],
        recipe=TrainingRecipe(1500, 16, 1e-2, **AUTHORS_T5),
        arms=tuple(finetuning.ARMS),
        weight_decays=(0.007, 0.55),
        minilm=Distillation(),
        minilm_recipe=TrainingRecipe(300, 16, 1e-3, weight_decay=0.01, betas=ADAMW),
        minilm_arms=("vanilla", "modified", finetuning.LIFTED, "JSReLU and zeroth bias, norms free"),
        minilm_l1=(0.03, 0.1, 0.3),
        log_every=100,
    ),
    "paper": Settings(
        seeds=(0,),
        task=replace(T5["paper"]["task"], pretrained=True),
        start=None,
        arms=tuple(finetuning.ARMS),
        recipe=TrainingRecipe(10_000, 256, 1e-2, **AUTHORS_T5),
        weight_decays=(1e-3,),
        rank=192,
        minilm=None,
        log_every=50,
    ),
}


def measure(settings, context):
    yield from finetuning.measure([*minilm_runs(settings), *t5_runs(settings)], context, settings.kept)


def t5_runs(settings):
    """Yield labels and description of every run of T5: one setting per weight decay, the first with the L1 rivals."""
    options = dict(exempt=PROTOCOLS["t5"], log_every=settings.log_every)
    for place, decay in enumerate(settings.weight_decays):
        tuning = FineTuning(settings.start and Run(settings.task, settings.start, **options), settings.rank)
        recipe = replace(settings.recipe, weight_decay=decay)
        one = Run(settings.task, recipe, snapshots=2, tuning=replace(tuning, alpha=settings.alpha), **options)
        name = f"T5, {recipe.steps} steps, decay {decay:g}"
        l1 = () if place else settings.l1
        yield from finetuning.plan_finetuning(name, one, settings.arms, settings.seeds, l1, before=not place)


def minilm_runs(settings):
    """Yield labels and description of every run of MiniLM."""
    if settings.minilm is None:
        return
    recipe = settings.minilm_recipe
    tuning = FineTuning(None, settings.minilm_rank, settings.minilm_alpha)
    one = Run(settings.minilm, recipe, log_every=max(1, recipe.steps // 12), snapshots=2, tuning=tuning)
    name = f"MiniLM, {recipe.steps} steps"
    yield from finetuning.plan_finetuning(name, one, settings.minilm_arms, settings.seeds, settings.minilm_l1)


def margin(setting):
    """Return how much larger than vanilla's the loss may be at equal accuracy."""
    return MARGINS[setting.split(",")[0]]


JUDGED = dict(metric="loss", margin=margin)
DEVIATIONS = (
    "At laptop and workstation scale: small T5s on bytes of Python sources and docstrings, minutes of training and of "
    "fine-tuning instead of 1e5 and 1e4 steps on C4.",
    "At paper scale the start is google-t5/t5-base, whose weights have seen C4 and supervised tasks; the authors start "
    "from their own T5.",
    "One batch a step, where the authors accumulate two halves. Statistics leave padding out; the authors count it.",
    "The bounds of norms and zeroth biases are applied after every optimiser step, first the norms.",
    *COMMON_DEVIATIONS,
)

EXPERIMENT = Experiment(
    __doc__,
    SCALES,
    measure,
    draw=partial(finetuning_tables.draw, score="test loss", **JUDGED),
    compare=partial(finetuning_tables.compare, same_setting="no: small T5 on Python sources, and MiniLM", **JUDGED),
    tables=partial(finetuning_tables.tables, score="token accuracy or cosine, %", **JUDGED),
    remarks=partial(finetuning_tables.remarks, **JUDGED),
    verdict=partial(finetuning_tables.verdict, **JUDGED),
    deviations=DEVIATIONS,
    styles=finetuning.STYLES,
    claims=partial(
        finetuning_tables.stated_claims, claim="The plug-ins make a trained vanilla T5 sparser, by LoRA", **JUDGED
    ),
    captions=finetuning_tables.CAPTIONS,
)

if __name__ == "__main__":
    run(EXPERIMENT)
