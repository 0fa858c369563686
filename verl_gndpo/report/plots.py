# SPDX-License-Identifier: Apache-2.0
"""List the plots of a report: the caption, the metrics and the way of drawing of each. Add a plot here."""

from verl_gndpo.report import drawing
from verl_gndpo.report.curves import draw_accuracy, draw_log_ratio, draw_metrics, draw_warnings
from verl_gndpo.report.drawing import Metric, Picture, Plot
from verl_gndpo.report.groups import draw_groups, draw_positions
from verl_gndpo.report.logs import Arm
from verl_gndpo.report.table import Teacher
from verl_gndpo.report.timing import draw_timing

# The same as in docs/metrics.md.
CORRELATION_LIMIT = 0.99

RESULT, SIGNAL, GRADIENT, RUN = "Result", "Signal", "Where the gradient comes from", "Responses and time"
TOKENS = "share of tokens"
K1, SIZE = "k1 [nats]", "mean |A|"


def _by(group: str) -> tuple[Metric, ...]:
    return (
        Metric((f"gndpo/{group}/*/k1",), "distance from the teacher (k1)", K1),
        Metric((f"gndpo/{group}/*/advantage_abs_mean",), "weight of a token in the gradient", SIZE),
    )


PLOTS = (
    Plot(
        RESULT,
        "accuracy",
        "Validation accuracy",
        "Dashed: the teacher, if its accuracy is known.",
        draw_accuracy,
    ),
    Plot(
        RESULT,
        "reward",
        "Task reward",
        "The mean over the rollouts that the student is trained on.",
        draw_metrics,
        (Metric(("critic/score/mean", "critic/rewards/mean"), "mean", "reward"),),
    ),
    Plot(
        RESULT,
        "grad_norm",
        "Gradient norm",
        "Before clipping. If the maximum is far above the median, single steps throw the student off.",
        draw_metrics,
        (Metric(("actor/grad_norm",), "gradient norm", "gradient norm"),),
        logarithmic=True,
        marks=True,
    ),
    Plot(
        RESULT,
        "warnings",
        "Warnings",
        "Thick: steps at which a limit of algorithm.gndpo.warn was passed. Thin: steps that were checked.",
        draw_warnings,
    ),
    Plot(
        SIGNAL,
        "kl",
        "Distance from the teacher",
        "Estimates of KL(student ‖ teacher) per token. Both fall when the student learns; k3 is the steadier one.",
        draw_metrics,
        (Metric(("gndpo/k1",), "k1", "nats"), Metric(("gndpo/k3",), "k3", "nats")),
    ),
    Plot(
        SIGNAL,
        "log_ratio",
        "Log-ratio of teacher and student",
        "log π_T − log π_old of the sampled tokens, before the bound: the mean rises towards 0 as the student "
        "approaches the teacher. Bands: between quantiles over tokens. Several runs: medians over runs.",
        draw_log_ratio,
    ),
    Plot(
        SIGNAL,
        "signal",
        "Mean and deviation of the bounded signal",
        "Whitening subtracts mu and divides by sigma. In nats, or in the bound’s own unit.",
        draw_metrics,
        (Metric(("gndpo/mu",), "mu", "bounded signal"), Metric(("gndpo/sigma",), "sigma", "bounded signal")),
    ),
    Plot(
        SIGNAL,
        "gain",
        "Gain",
        "The factor on the centred signal. If it grows without end, noise is re-inflated near convergence.",
        draw_metrics,
        (Metric(("gndpo/gain",), "gain", "gain"),),
        logarithmic=True,
    ),
    Plot(
        SIGNAL,
        "clipping",
        "Tokens beyond the bound",
        "If it is more than a few per cent, teacher and student disagree badly, or don't fit together.",
        draw_metrics,
        (
            Metric(("gndpo/clipped_low_share",), "below −limit", TOKENS),
            Metric(("gndpo/clipped_high_share",), "above +limit", TOKENS),
        ),
    ),
    Plot(
        SIGNAL,
        "beyond",
        "Tokens with a large log-ratio",
        "Log-ratios of either sign beyond 1, 5 and 10 nats. Style rarely explains more than 10: look at the worst "
        "tokens.",
        draw_metrics,
        tuple(Metric((f"gndpo/log_ratio/beyond_{nats}_share",), f"beyond {nats} nats", TOKENS) for nats in (1, 5, 10)),
        logarithmic=True,
    ),
    Plot(
        SIGNAL,
        "sign_flips",
        "Sign flips",
        "Tokens whose advantage and bounded signal differ in sign: the teacher dislikes them but they are reinforced, "
        "or the reverse.",
        draw_metrics,
        (Metric(("gndpo/sign_flip_share",), "sign flips", TOKENS),),
    ),
    Plot(
        SIGNAL,
        "correlation",
        "Correlation of rollout and actor probabilities",
        f"Below {CORRELATION_LIMIT}, the rollout engine and the training engine disagree, and no signal helps.",
        draw_metrics,
        (Metric(("training/rollout_actor_probs_pearson_corr",), "correlation", "Pearson correlation"),),
        limit=CORRELATION_LIMIT,
    ),
    Plot(
        GRADIENT,
        "concentration",
        "Concentration of the gradient",
        "Few tokens do all the work if the top 1 % has much of the gradient (0.03 for normal advantages), if the "
        "effective sample is small (0.64 for normal advantages), if the kurtosis is in the hundreds, or if the largest "
        "advantage is far above 10.",
        draw_metrics,
        (
            Metric(("gndpo/top_1pct_gradient_share",), "top 1 % of tokens", "share"),
            Metric(("gndpo/effective_sample_share",), "effective sample", "share"),
            Metric(("gndpo/advantage_kurtosis",), "kurtosis of the advantages", "excess kurtosis"),
            Metric(("gndpo/advantage_abs_max",), "largest advantage", "max |A|"),
        ),
        logarithmic=True,
    ),
    Plot(
        GRADIENT,
        "positions",
        "Along the response",
        "If the distance rises along the response, the student goes where the teacher has no experience.",
        draw_positions,
        _by("position"),
    ),
    Plot(
        GRADIENT,
        "token_classes",
        "By kind of token",
        "If most of the signal (share times weight) is in format, the student learns to look like the teacher.",
        draw_groups,
        (*_by("token"), Metric(("gndpo/token/*/share",), "share of the tokens", "share")),
    ),
    Plot(
        GRADIENT,
        "data_sources",
        "By data source",
        "Logged if a batch has several. If one has a much larger share of the gradient than of the tokens, or nearly "
        "all of it, the others hardly train.",
        draw_groups,
        (
            Metric(("gndpo/data_source/*/k1",), "distance from the teacher (k1)", K1),
            Metric(("gndpo/data_source/*/gradient_share",), "share of the gradient", "share"),
            Metric(("gndpo/data_source/*/share",), "share of the tokens", "share"),
        ),
    ),
    Plot(
        GRADIENT,
        "teachers",
        "By teacher",
        "Logged if there are several. The student doesn't learn from a teacher whose k1 stays while the others’ falls. "
        "A teacher with a much larger sigma outweighs the others, unless each is scaled separately.",
        draw_groups,
        (
            Metric(("gndpo/teacher/*/k1",), "distance from the teacher (k1)", K1),
            Metric(("gndpo/teacher/*/sigma",), "deviation of its signal (sigma)", "sigma"),
        ),
    ),
    Plot(
        RUN,
        "response_length",
        "Response length and ends",
        "Responses at the limit or without EOS are cut off. If there are many, the student doesn't learn to end them.",
        draw_metrics,
        (
            Metric(("response_length/mean",), "mean", "tokens"),
            Metric(("gndpo/response/length_p95",), "95th percentile", "tokens"),
            Metric(("response_length/max",), "max", "tokens"),
            Metric(("response_length/clip_ratio",), "at the limit", "share of responses"),
            Metric(("gndpo/response/truncated_share",), "without EOS", "share of responses"),
            Metric(("gndpo/response/eos_share",), "EOS tokens", TOKENS),
        ),
    ),
    Plot(
        RUN,
        "timing",
        "Time per stage",
        "Stages as verl times them, with their means. A stage that is timed within another is subtracted from it. "
        "“other” is the rest of timing_s/step. Validation is “testing”.",
        draw_timing,
    ),
    Plot(
        RUN,
        "teacher_ahead",
        "Scored while the rollout ran",
        "Responses that a dedicated teacher or servers scored before the rollout ended. If it is near 0, all responses "
        "end at the same time, or the teacher is too slow.",
        draw_metrics,
        (Metric(("gndpo/teacher_ahead_share",), "scored ahead", "share of responses"),),
    ),
)


def draw_plots(arms: list[Arm], teacher: Teacher) -> list[Picture]:
    """Draw all plots in order. A plot without data has remarks that say why."""
    return [_draw_plot(plot, arms, teacher) for plot in PLOTS]


def _draw_plot(plot: Plot, arms: list[Arm], teacher: Teacher) -> Picture:
    picture = Picture(plot)
    figure = plot.draw(picture, arms, teacher)
    if figure is not None:
        drawing.headline(figure, plot.title)
        picture.png = drawing.png(figure)
        picture.wide = drawing.is_wide(figure)
    return picture
