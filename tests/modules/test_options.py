"""An option that changes nothing is a bug: every option of every constructor names the check that shows its effect."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from option_checks import (
    Bench,
    Check,
    RandomGroups,
    TinyModel,
    adapts,
    adapts_rewards,
    changes_losses,
    changes_rewards,
    changes_updates,
    lays_out,
    lays_rewards_out,
    loads,
    logs_entropy,
    optimises,
    recomputes,
)

from lightning_pref.data.datamodule import PreferenceData
from lightning_pref.data.playground_source import PlaygroundSettings
from lightning_pref.models.adapters import LoraSettings
from lightning_pref.models.quantised import QuantizationSettings
from lightning_pref.models.reference import EmaSettings
from lightning_pref.modules import DPOModule, SFTModule
from lightning_pref.modules.group_module import Loading
from lightning_pref.modules.optimisation import OptimizerSettings
from lightning_pref.modules.policy import PolicyModule
from lightning_pref.modules.reward import RewardModule
from lightning_pref.modules.rlhf import RLHFModule
from lightning_pref.modules.rlhf_settings import (
    AdvantageSettings,
    KLSettings,
    ScoreSettings,
    SurrogateSettings,
    ValueSettings,
)
from lightning_pref.rollouts.rollout_data import RolloutData
from lightning_pref.rollouts.sampling import Sampling
from lightning_pref.rollouts.validation import HeldOutSampling

TESTS = Path(__file__).parent.parent

SETTINGS_OF_A_POLICY: dict[str, Callable[[type[PolicyModule]], Check]] = {
    "layout": lays_out,
    "lora": adapts,
    "optimizer": optimises,
    "loading": lambda kind: loads(kind, dtype="bfloat16"),
    "gradient_checkpointing": recomputes,
    "log_entropy": logs_entropy,
}

DATA = "data/test_datamodule.py::"
REPLAY = "data/test_replay.py::"
DPO = "modules/test_dpo.py::"
CACHE = "modules/test_reference_pass.py::"
RLHF = "modules/test_rlhf_settings.py::"
VALIDATION = "rollouts/test_validation.py::"
ENSEMBLE = "modules/test_reward_ensembles.py::"
ROLLOUT = "rollouts/test_rollout_data.py::"
REWARDS = "rollouts/test_rewards.py::"
CHANGES = RLHF + "test_a_setting_changes_where_the_policy_goes"
REWARD = "modules/test_reward.py::"
REWARD_LOSS = "modules/test_reward_losses.py::"
REWARD_METRIC = "modules/test_reward_metrics.py::"
OPTIMIZERS = "modules/test_optimizers.py::"
QUANTISED = "models/test_quantised.py::"

# By option: a check, or the test elsewhere that shows the effect.
CHECKS: dict[type[Any], dict[str, Check | str]] = {
    DPOModule: {
        "model": "modules/test_policy.py::test_a_model_given_as_an_object_is_saved_once_as_one_given_by_folder_is",
        "loss": DPO + "test_every_pairwise_loss_of_a_batch_is_that_of_its_rows_one_by_one",
        "beta": changes_losses(DPOModule, beta=0.5),
        "loss_options": changes_losses(DPOModule, loss_options={"f_divergence": "forward_kl"}),
        "reference": CACHE + "test_a_cache_gives_the_losses_of_a_frozen_copy",
        "reference_model": CACHE + "test_another_model_can_be_cached",
        "ema": DPO + "test_the_reference_follows_the_policy_where_ema_is_asked_for",
        "reference_cache": CACHE + "test_R5_a_stale_cache_in_a_folder_of_ones_own_raises_and_names_the_part",
        "pairs": DPO + "test_ranked_responses_make_all_pairs_and_share_the_weight_of_their_prompt",
        "tail_weight": DPO + "test_F2_tail_weight_zero_cuts_both_sides_to_the_shorter_length_in_policy_and_reference",
        "weigh_by_policy": DPO + "test_weighing_by_the_policy_multiplies_the_loss_by_both_responses_weights",
        "retain_weight": DPO + "test_forgetting_acts_on_bad_responses_and_keeps_good_ones_by_their_likelihood",
        **{name: check(DPOModule) for name, check in SETTINGS_OF_A_POLICY.items()},
    },
    SFTModule: {
        "model": "modules/test_policy.py::test_loading_settings_reach_the_model",
        "normalize": changes_losses(SFTModule, normalize="sequence"),
        **{name: check(SFTModule) for name, check in SETTINGS_OF_A_POLICY.items()},
    },
    RewardModule: {
        "model": REWARD + "test_a_model_may_be_a_preset_a_folder_or_an_object",
        "loss": REWARD + "test_N1_one_update_is_the_mean_over_all_rows_however_it_is_accumulated",
        "head": REWARD + "test_W5_an_exported_module_scores_alike",
        **dict.fromkeys(("num_members", "aggregate", "uwo_coefficient"), REWARD_METRIC + "test_metrics_are_those_of_the_rewards"),
        "ensemble": ENSEMBLE + "test_members_of_adapters_are_trained_apart_and_their_disagreement_is_logged",
        "bootstrap": ENSEMBLE + "test_a_bootstrapped_loss_counts_each_row_as_often_as_the_member_drew_it",
        "head_seed": changes_rewards(head_seed=1),
        "pairs": REWARD_LOSS + "test_pairs_of_a_ranked_list_share_its_weight",
        **dict.fromkeys(
            ("margin_scale", "center", "label_smoothing"),
            REWARD_LOSS + "test_bradley_terry_is_the_mean_over_members_and_pairs",
        ),
        "top_k": REWARD_LOSS + "test_plackett_luce_is_minus_the_log_probability_of_the_order",
        "levels": REWARD_LOSS + "test_ordinal_levels_are_told_apart_by_trained_thresholds",
        "label_words": REWARD + "test_label_words_are_found_in_the_tokenizer_of_a_preset",
        "beta": REWARD_LOSS + "test_an_implicit_reward_on_pairs_is_dpo",
        "reference": REWARD_LOSS + "test_an_implicit_reward_under_lora_is_measured_against_its_base",
        "reference_model": REWARD_LOSS + "test_an_implicit_reward_on_pairs_is_dpo",
        "layout": lays_rewards_out,
        "lora": adapts_rewards,
        "optimizer": optimises(RewardModule),
        "loading": REWARD + "test_loading_settings_reach_the_model_of_every_head",
        "gradient_checkpointing": recomputes(RewardModule),
    },
    RLHFModule: {
        **dict.fromkeys(
            (
                "algorithm",
                "surrogate",
                "kl",
                "advantage",
                "value",
                "scores",
                "pair_loss",
                "beta",
                "loss_options",
                "ema",
                "entropy_bonus",
            ),
            CHANGES,
        ),
        "model": RLHF + "test_the_reference_is_what_was_asked_for",
        "reference": RLHF + "test_the_reference_is_what_was_asked_for",
        "reference_model": RLHF + "test_the_reference_is_what_was_asked_for",
        "log_samples_every": RLHF + "test_samples_are_shown_every_so_many_rollouts",
        "layout": RLHF + "test_policy_and_value_model_are_adapted_and_laid_out_alike",
        "lora": RLHF + "test_policy_and_value_model_are_adapted_and_laid_out_alike",
        "optimizer": RLHF + "test_the_optimizer_is_the_one_that_was_asked_for",
        "loading": loads(RLHFModule, dtype="bfloat16"),
        "gradient_checkpointing": "modules/test_rlhf.py::test_P4_a_rollout_leaves_modes_checkpointing_and_random_state_alone",
        "log_entropy": RLHF + "test_the_entropy_is_logged_unless_it_is_not_wanted",
    },
    **{
        kind: dict.fromkeys(inspect.signature(kind).parameters, CHANGES)
        for kind in (AdvantageSettings, ScoreSettings, SurrogateSettings)
    },
    KLSettings: {
        **dict.fromkeys(("coefficient", "place", "gradient", "target", "horizon"), CHANGES),
        "estimator": RLHF + "test_the_estimator_of_the_kl_in_the_loss_is_what_the_loss_shows",
    },
    ValueSettings: {
        **dict.fromkeys(("trunk", "coefficient", "clip", "rate_factor"), CHANGES),
        "model": RLHF + "test_a_value_model_starts_from_a_reward_model_with_its_head_and_else_from_0",
    },
    Sampling: {
        **dict.fromkeys(("max_new_tokens", "temperature"), ROLLOUT + "test_sampling_settings_reach_the_samples"),
        **dict.fromkeys(
            ("top_k", "top_p", "min_p"),
            "rollouts/test_generate.py::test_L12_the_log_prob_of_every_token_is_that_of_a_plain_forward",
        ),
    },
    HeldOutSampling: {
        "num_samples": VALIDATION + "test_several_answers_to_a_prompt_reach_the_monitors_under_their_own_source",
        "temperature": VALIDATION + "test_what_is_logged_is_the_reward_of_greedy_answers_to_every_prompt_once",
    },
    RolloutData: {
        **dict.fromkeys(
            ("train", "limit_rows", "columns", "max_prompt_length"), ROLLOUT + "test_several_sources_and_their_settings_are_read"
        ),
        **dict.fromkeys(
            ("num_prompts", "num_samples", "inner_epochs", "num_minibatches"),
            ROLLOUT + "test_the_shape_of_a_rollout_is_what_was_asked_for",
        ),
        **dict.fromkeys(("split", "subset", "revision"), ROLLOUT + "test_split_subset_and_revision_reach_the_reader"),
        **dict.fromkeys(("chat_template", "template_date"), ROLLOUT + "test_a_chat_template_of_ones_own_and_its_date_are_used"),
        "reward": REWARDS + "test_a_function_gets_prompt_and_response_and_the_columns_it_names",
        **dict.fromkeys(("aggregate", "uwo_coefficient"), REWARDS + "test_an_ensemble_of_folders_and_of_heads_is_aggregated"),
        "gold": ROLLOUT + "test_a_gold_reward_is_watched_and_not_trained_on",
        **dict.fromkeys(
            ("reward_dtype", "reward_batch_size"), ROLLOUT + "test_how_a_reward_model_is_loaded_and_read_is_as_asked"
        ),
        "sampling": ROLLOUT + "test_sampling_settings_reach_the_samples",
        "max_rows": ROLLOUT + "test_max_rows_bounds_what_is_decoded_together",
        "on_bad_row": ROLLOUT + "test_bad_rows_are_skipped_and_counted_where_that_is_asked",
        "tokenizer": ROLLOUT + "test_a_run_without_a_tokenizer_or_a_setup_says_so",
        "val": VALIDATION + "test_what_is_logged_is_the_reward_of_greedy_answers_to_every_prompt_once",
        "val_size": VALIDATION + "test_a_part_of_the_prompts_is_held_out_by_their_hash",
        "val_split": VALIDATION + "test_a_split_or_the_playgrounds_own_prompts_can_be_the_validation",
        "val_sampling": VALIDATION + "test_several_answers_to_a_prompt_reach_the_monitors_under_their_own_source",
        "seed": ROLLOUT + "test_the_seed_decides_order_and_samples",
        "playground": ROLLOUT + "test_playground_prompts_are_answered_for_a_reward_with_its_flaw",
    },
    OptimizerSettings: {
        "name": OPTIMIZERS + "test_updates_are_those_of_the_paper",
        "learning_rate": changes_updates(learning_rate=0.2),
        "weight_decay": changes_updates(weight_decay=0.5),
        "betas": changes_updates(betas=(0.5, 0.9)),
        "eps": changes_updates(eps=1.0),
        "schedule": changes_updates(schedule="constant"),
        "warmup": changes_updates(warmup=3),
        "floor": changes_updates(floor=0.9),
        "rounding": OPTIMIZERS + "test_kahan_summation_keeps_every_small_update",
    },
    Loading: {
        "dtype": "modules/test_policy.py::test_loading_settings_reach_the_model",
        "attn_implementation": "modules/test_policy.py::test_loading_settings_reach_the_model",
        "revision": loads(DPOModule, revision="v2"),
        "trust_remote_code": loads(DPOModule, trust_remote_code=True),
        "seed": "modules/test_policy.py::test_the_seed_of_loading_is_that_of_a_presets_weights",
        "quantization": QUANTISED + "test_a_quantised_base_trains_its_adapter_and_nothing_else",
    },
    QuantizationSettings: dict.fromkeys(
        ("kind", "compute_dtype", "double"), QUANTISED + "test_every_quantisation_setting_has_its_effect"
    ),
    LoraSettings: dict.fromkeys(
        ("r", "alpha", "dropout", "target_modules", "modules_to_save", "rslora"),
        "models/test_adapters.py::test_every_lora_setting_has_its_effect",
    ),
    EmaSettings: dict.fromkeys(
        ("mixing", "every_n_updates"), "models/test_reference.py::test_an_ema_reference_follows_every_k_updates"
    ),
    PreferenceData: {
        "train": DATA + "test_several_sources_make_one_data_set",
        "val": DATA + "test_validation_data_of_its_own_is_used_whole",
        "val_size": DATA + "test_a_share_is_held_out_unless_said_otherwise",
        "split": DATA + "test_a_split_of_the_training_folder_can_be_the_validation",
        "val_split": DATA + "test_a_split_of_the_training_folder_can_be_the_validation",
        "subset": DATA + "test_subset_and_revision_reach_the_hub",
        "revision": DATA + "test_subset_and_revision_reach_the_hub",
        "columns": DATA + "test_columns_and_limit_rows_choose_what_is_read",
        "limit_rows": DATA + "test_columns_and_limit_rows_choose_what_is_read",
        "on_bad_row": DATA + "test_bad_rows_are_skipped_where_that_is_asked",
        "tokenizer": DATA + "test_the_tokenizer_may_be_a_folder",
        "chat_template": DATA + "test_a_chat_template_of_ones_own_is_used",
        "template_date": DATA + "test_a_template_that_prints_the_date_is_told_the_day",
        "step_separator": DATA + "test_the_step_separator_stands_after_each_step",
        "max_length": DATA + "test_settings_of_the_tokenisation_reach_the_tokens",
        "max_prompt_length": DATA + "test_settings_of_the_tokenisation_reach_the_tokens",
        "truncation": DATA + "test_settings_of_the_tokenisation_reach_the_tokens",
        "max_tokens_per_batch": DATA + "test_both_bounds_hold_at_once",
        "batch_size": DATA + "test_both_bounds_hold_at_once",
        "replay": REPLAY + "test_a_trainer_sees_exactly_the_wanted_share_of_old_rows_in_every_epoch",
        "replay_share": REPLAY + "test_a_trainer_sees_exactly_the_wanted_share_of_old_rows_in_every_epoch",
        "keep_rows": REPLAY + "test_a_trainer_sees_a_fixed_part_of_the_rows_in_every_epoch",
        "keep_rows_by": REPLAY + "test_rows_are_kept_by_the_values_of_a_column",
        "seed": DATA + "test_the_seed_changes_the_order_and_nothing_else",
        "num_workers": DATA + "test_workers_change_nothing",
        "cache_dir": DATA + "test_the_cache_lies_in_the_users_cache_folder_unless_said",
        "playground": DATA + "test_a_trainer_sees_every_row_of_the_playground_once_an_epoch",
    },
    PlaygroundSettings: {
        **dict.fromkeys(
            ("num_rows", "seed", "noise", "long_prompts", "conversational", "flaw"),
            "data/test_playground_source.py::test_every_playground_setting_changes_the_data",
        ),
        "num_val_rows": "data/test_playground_source.py::test_no_validation_rows_of_the_playground_means_no_validation",
        "num_responses": "data/test_playground_source.py::test_responses_of_ranked_playground_rows_can_be_counted_out",
    },
}


@pytest.mark.parametrize("kind", CHECKS)
def test_every_option_has_a_check_of_its_effect(kind: type[Any]) -> None:
    options = set(inspect.signature(kind).parameters)
    assert options - set(CHECKS[kind]) == set(), "options without a check"
    assert set(CHECKS[kind]) - options == set(), "checks of options that are gone"


@cache
def _tests_in(file: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(
    "place", sorted({check for checks in CHECKS.values() for check in checks.values() if isinstance(check, str)})
)
def test_a_test_that_is_named_as_a_check_exists(place: str) -> None:
    file, _, name = place.partition("::")
    assert name in _tests_in(TESTS / file)


@pytest.mark.parametrize(
    ("kind", "option"),
    [(kind, option) for kind, checks in CHECKS.items() for option, check in checks.items() if not isinstance(check, str)],
)
def test_an_option_has_its_effect(
    kind: type[Any],
    option: str,
    tiny_model: TinyModel,
    random_groups: RandomGroups,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = CHECKS[kind][option]
    assert not isinstance(check, str)
    check(Bench(tiny_model, random_groups, monkeypatch))
