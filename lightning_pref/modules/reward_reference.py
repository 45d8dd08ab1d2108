"""What an implicit reward is measured against, and what its export says of that."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Literal

from lightning.fabric.utilities.warnings import PossibleUserWarning
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_pref.models.digests import weights_digest
from lightning_pref.models.forward import Layout
from lightning_pref.models.heads import causal_lm_of
from lightning_pref.models.implicit_rewards import ImplicitSettings, save_implicit_settings, save_reference_beside
from lightning_pref.models.quantised import is_quantized
from lightning_pref.models.reference import FrozenCopy, Reference, summed_logps
from lightning_pref.models.reference_choice import resolve_reference
from lightning_pref.modules.group_module import Loading

RewardReference = Literal["auto", "copy", "adapter"]


def implicit_reference(
    kind: RewardReference, trained: PreTrainedModel | PeftModel, *, other_model: PreTrainedModel | None, layout: Layout
) -> Reference:
    """The reference of an implicit reward.

    Args:
        kind: What the user asked for.
        trained: The model before its first update.
        other_model: A model to use instead of it.
        layout: How the batch goes through the model.
    """
    # A frozen reference stays in eval mode on purpose; Lightning would advise against it in every run.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode", category=PossibleUserWarning)
    score = partial(summed_logps, layout=layout)
    found = resolve_reference(kind, trained, needs_reference=True, other_model=other_model, score=score)
    assert found is not None, "it is needed"
    return found


def digest_of_reference(reference: Reference, trained: PreTrainedModel | PeftModel) -> str:
    """Digest of the weights of a reference; before the precision rounds them and the strategy splits them."""
    return reference.digest if isinstance(reference, FrozenCopy) else weights_digest(trained)


def save_reference(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: Reference | None,
    trained: PreTrainedModel | PeftModel,
    name: str | PreTrainedModel,
    digest: str,
    beta: float,
    loading: Loading,
) -> None:
    """Write what makes an exported language model a reward, where its reference can be found again.

    Args:
        folder: Of the export.
        tokenizer: Of both models.
        reference: That it was trained against.
        trained: The model that was trained; without its adapter it may be the reference.
        name: Of the reference, or the model object it began as.
        digest: From `digest_of_reference`.
        beta: Rewards per nat.
        loading: How the reference was loaded.
    """
    model = reference.model if isinstance(reference, FrozenCopy) else trained
    if is_quantized(model):
        save_reference_beside(folder, model, tokenizer, beta=beta)
    elif isinstance(name, str):
        settings = ImplicitSettings(
            beta=beta,
            reference=name,
            revision=loading.revision,
            seed=loading.seed,
            loaded_in=loading.dtype,
            dtype=str(causal_lm_of(model).dtype).removeprefix("torch."),
            digest=digest,
        )
        save_implicit_settings(folder, settings)
