"""What the monitors and modules measure: pure functions, and torchmetrics that accumulate them exactly."""

from lightning_pref.measures.calibration import (
    Calibration,
    LengthBias,
    PairCalibration,
    SourceAccuracy,
    length_balanced_accuracy,
    pair_confidence,
)
from lightning_pref.measures.ches import ches, ches_from_sums
from lightning_pref.measures.correlation import average_ranks, pearson, rank_correlation
from lightning_pref.measures.displacement import Displacement, is_displaced, max_drawdown
from lightning_pref.measures.edits import edit_distance, normalized_edit_distance, shared_prefix_length
from lightning_pref.measures.entanglement import (
    GradientProducts,
    Head,
    Scored,
    head_gradient_products,
    in_band,
    predicted_changes,
    regimes,
)
from lightning_pref.measures.forgetting import (
    ProbeScores,
    StabilityGap,
    WindowedSwings,
    average_forgetting,
    bootstrap_deviations,
    minimum_accuracy,
    noise_floor,
    stability_gap,
    standard_error,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)
from lightning_pref.measures.lost_updates import is_lost, lost_share
from lightning_pref.measures.mass_shift import probability_change
from lightning_pref.measures.means import WeightedMeans
from lightning_pref.measures.overoptimization import (
    GaoFit,
    best_of_n,
    best_of_n_curve,
    ensemble_growth,
    fit_gao,
    kl_of_best_of_n,
    past_peak,
)
from lightning_pref.measures.pair_history import PairHistory
from lightning_pref.measures.policy_update import explained_variance, is_clipped, is_value_clipped
from lightning_pref.measures.proxy_history import ProxyHistory
from lightning_pref.measures.ranking import flip_threshold, idealized_ranking_accuracy, implicit_accuracy, ranking_accuracy
from lightning_pref.measures.spikes import (
    RobustDetector,
    effective_lr_multiplier,
    gradient_spike_score,
    robust_spikes,
    spam_ramp,
    spike_clip,
    spike_share,
)
from lightning_pref.measures.teaching import compare_pairs, length_correlation, relative_speed, score_drift
from lightning_pref.measures.variance import RewardVariance, prompt_statistics, reward_variance, variance_parts, whitened_variance

__all__ = [
    "Calibration",
    "Displacement",
    "GaoFit",
    "GradientProducts",
    "Head",
    "LengthBias",
    "PairCalibration",
    "PairHistory",
    "ProbeScores",
    "ProxyHistory",
    "RewardVariance",
    "RobustDetector",
    "Scored",
    "SourceAccuracy",
    "StabilityGap",
    "WeightedMeans",
    "WindowedSwings",
    "average_forgetting",
    "average_ranks",
    "best_of_n",
    "best_of_n_curve",
    "bootstrap_deviations",
    "ches",
    "ches_from_sums",
    "compare_pairs",
    "edit_distance",
    "effective_lr_multiplier",
    "ensemble_growth",
    "explained_variance",
    "fit_gao",
    "flip_threshold",
    "gradient_spike_score",
    "head_gradient_products",
    "idealized_ranking_accuracy",
    "implicit_accuracy",
    "in_band",
    "is_clipped",
    "is_displaced",
    "is_lost",
    "is_value_clipped",
    "kl_of_best_of_n",
    "length_balanced_accuracy",
    "length_correlation",
    "lost_share",
    "max_drawdown",
    "minimum_accuracy",
    "noise_floor",
    "normalized_edit_distance",
    "pair_confidence",
    "past_peak",
    "pearson",
    "predicted_changes",
    "probability_change",
    "prompt_statistics",
    "rank_correlation",
    "ranking_accuracy",
    "regimes",
    "relative_speed",
    "reward_variance",
    "robust_spikes",
    "score_drift",
    "shared_prefix_length",
    "spam_ramp",
    "spike_clip",
    "spike_share",
    "stability_gap",
    "standard_error",
    "variance_parts",
    "whitened_variance",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]
