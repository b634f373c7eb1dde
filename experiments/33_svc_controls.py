"""What remains of SVC's gain without a shared domain, on other bases, beside a scale without data, and beside rivals.

The suites of experiment 22 at one width, under four conditions. "glyph-96": all tasks share one artificial domain, so
that over-accumulation is built in. "own domains": every task has a domain of its own. "base 1" and "base 2": further
pretrained models, since all seeds of a condition share one. Every merger, and with it WUDI, also as the minimum that it
approaches, Subspace Boosting and LiNeS (merging/rivals.py), stands at its own scale, norm-matched, which needs no data
and no SVD (merging/norm_matching.py: every merged tensor rescaled to the mean norm of the experts' updates of it), and
at a scale tuned on validation data, three faces of two families; each with and without SVC.

Claim    SVC raises every merger because merging over-counts what tasks share (Theorems 3.2, 3.3; the main table). The
         paper compares with no other way to set the scale, and with tasks that share what photographs share.
Verdict  on suites of 8 and 20 tasks, these four conditions and at least 3 seeds (else "not run at this scale"), from
         pooled paired 95 % intervals (each task counts once; seeds, tasks and images resampled):
         Domain  (SVC − base) of Task Arithmetic, TIES and DARE at their own scales, own domains: "SVC's gain needs no
                 shared domain" if all three are above 0, "needs a shared domain" if none is, else "needs one in part".
         Tuned   (tuned SVC − tuned base) of the six published mergers, in each condition: how many are above and
                 below 0.
         Norms   (norm matching − tuned base) over all cells: norm matching "replaces" a tuned scale if it lies above
                 −1.5 points, else "is worse" if it lies below 0, else "undecided". Predicted before any run: it
                 replaces the tuned scale of the six linear mergers (average, Task Arithmetic, sum, TIES, DARE, STAR),
                 and is worse for TSV-M, Iso-C and Iso-CTS, whose spectra are flat on purpose. What SVC does beyond a
                 scale for each tensor is (SVC − base, both norm-matched).
         Bases   beside: the same tuned gain on the three bases with a shared domain, as mean ± standard deviation over
                 bases, since no interval above covers another base.
         Rivals  beside: the authors of Subspace Boosting and LiNeS tune them on data, so that their row is the tuned
                 one.
Testbed  the rule of merging/suites/testbed.py; suites that are none do not count.
Cost     smoke 30 s; laptop 8 min, workstation 1.5 h (2 cores, estimated); paper: nine passes over the 8 test sets, not
         timed.
Run      python experiments/33_svc_controls.py --scale laptop
"""

from dataclasses import dataclass, replace

from common.lab.claims import intervals, question
from common.lab.run import Experiment, run
from merging import MERGERS, mergers
from merging.suites import comparison, controls, testbed, vision
from merging.suites.comparison import SVC_GAIN, TUNED_GAIN
from merging.suites.suite import measure_suites

SHARED, OWN = "glyph-96", "glyph-96 own domains"
BASES = (SHARED, "glyph-96 base 1", "glyph-96 base 2")
LINEAR = mergers.PUBLISHED[:3]


@dataclass(frozen=True)
class Settings:
    seeds: tuple[int, ...] = (0,)
    suites: tuple[int, ...] = (8,)  # numbers of tasks
    # glyph-WIDTH, also with " own domains" or " base 1", or ViT-B/32 (from the hub)
    backbones: tuple[str, ...] = (SHARED, OWN)
    methods: tuple[str, ...] = (*mergers.OFFICIAL, "wudi", "wudi_minimum", "subspace_boost", "lines")
    recipe: vision.GlyphRecipe = vision.GlyphRecipe(wide_validation=True)

    def __post_init__(self):
        vision.check_suites(self.backbones, self.suites)
        mergers.check_methods(self.methods)


SCALES = {
    "smoke": Settings(
        suites=(2,),
        backbones=("glyph-32", "glyph-32 own domains", "glyph-32 base 1"),
        methods=("task_arithmetic", "dare", *mergers.RIVALS),
        recipe=replace(vision.SMOKE, wide_validation=True),
    ),
    "laptop": Settings(),
    "workstation": Settings((0, 1, 2), (8, 20), (*BASES, OWN)),
    "paper": Settings(backbones=("ViT-B/32",), methods=tuple(MERGERS)),
}


def measure(settings, context):
    yield from measure_suites(vision, settings, context, testbed.judged_rows)


# From here on only the table is seen --------------------------------------------------------------------------------


def draw(data):
    return controls.draw_by_backbone(data)


def compare(data, published):
    standing = data[data.backbone.isin([*vision.STANDS_FOR, *vision.STANDS_FOR.values()])]
    means = comparison.variant_means(comparison.models(standing if len(standing) else data))
    return comparison.compared(means, published, vision.published_number, vision.setting)


def tables(data):
    shown = {testbed.HEADING: testbed.table(data)}
    shown["Tuned SVC − tuned base, points, by base"] = controls.over_bases(data[data.backbone.isin(BASES)], TUNED_GAIN)
    for backbone in comparison.by_size(data.backbone):
        own = controls.tables(data[data.backbone == backbone])
        shown |= {f"{heading} ({backbone})": table for heading, table in own.items()}
    return shown


def verdict(data):
    cells = set(zip(data.backbone, data.suite, strict=True))
    wanted = {(backbone, suite) for backbone in (*BASES, OWN) for suite in (8, 20)}
    if not wanted <= cells or data.seed.nunique() < 3:
        return "not run at this scale"
    counted = testbed.on_testbeds(data, data)
    parts = [domain_part(counted)]
    for backbone in comparison.by_size(counted.backbone):
        found = controls.pooled(counted[(counted.backbone == backbone) & counted.method.isin(mergers.PUBLISHED)])
        signs = found.sign[found.condition == TUNED_GAIN]
        parts.append(f"Tuned SVC − tuned base on {backbone}: {comparison.counted(signs)} published mergers.")
    found = controls.pooled(counted)
    parts += [controls.beside_a_tuned_scale(found).strip()]
    parts += [f"SVC beyond a scale for each tensor: {controls.brief(found, controls.SPECTRUM)} points."]
    return " ".join([*parts, testbed.sentence(data)])


def domain_part(data):
    found = controls.pooled(data[data.backbone == OWN])
    gains = found[(found.condition == SVC_GAIN) & found.method.isin(LINEAR)]
    if set(gains.method) != set(LINEAR):
        return "Own domains: no testbed."
    above = (gains.sign == 1).sum()
    words = (
        "needs no shared domain" if above == len(LINEAR) else "needs one in part" if above else "needs a shared domain"
    )
    return f"SVC's gain {words}: with own domains, SVC − base is {controls.brief(gains, SVC_GAIN)} points."


def claims(data):
    """Four questions, by the parts of the rule, pooled over the cells that count."""
    said, counted = verdict(data), testbed.on_testbeds(data, data)
    seeds, found = data.seed.nunique(), controls.pooled(counted)
    own = controls.pooled(counted[counted.backbone == OWN])
    published, gained = (x[x.method.isin(methods)] for x, methods in ((found, mergers.PUBLISHED), (own, LINEAR)))
    answers = list(controls.replaced(found).values())
    tuned, spectrum = (x[x.condition == name] for x, name in ((published, TUNED_GAIN), (found, controls.SPECTRUM)))
    gained = intervals(list(gained[gained.condition == SVC_GAIN].interval), "points", seeds)
    words = (
        f"replaces it for {answers.count('replaces it')}, is worse for {answers.count('is worse')} of {len(answers)}"
    )
    texts = {
        "Does SVC raise Task Arithmetic, TIES and DARE where tasks share no domain?": gained,
        "Does it raise the six published mergers at tuned scales, pooled?": by_merger(tuned, seeds),
        "Does norm matching, without data, replace a tuned scale?": f"{words} (n = {seeds})",
        "Does SVC do more than a scale for each tensor? (both norm-matched)": by_merger(spectrum, seeds),
    }
    return [question(text, ours, said) for text, ours in texts.items()]


def by_merger(rows, seeds):
    """How many mergers have a pooled interval above and below 0."""
    above, below = (rows.sign == 1).sum(), (rows.sign == -1).sum()
    return f"above in {above}, below in {below} of {len(rows)} mergers (n = {seeds})"


DEVIATIONS = (
    "Nothing of this is in the paper, except SVC's gain at the mergers' own scales, for which see experiment 22.",
    "All seeds of a condition share one pretrained base; own domains start from the base of glyph-96.",
    "Wide validation: scales are tuned on three faces of two families and experts trained on eight, so that the rows "
    "of glyph-96 are not those of experiment 22.",
    "WUDI's learning rate and steps are its authors'; on updates as small as these it ends far from its minimum.",
)

EXPERIMENT = Experiment(
    __doc__,
    SCALES,
    measure,
    draw,
    compare,
    verdict,
    published="merging",
    tables=tables,
    deviations=DEVIATIONS,
    styles=comparison.merging_styles(),
    claims=claims,
    captions=controls.CAPTIONS,
)

if __name__ == "__main__":
    run(EXPERIMENT)
