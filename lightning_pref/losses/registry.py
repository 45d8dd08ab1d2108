"""Every loss by name. A new one: its function beside its family, one entry here, one row in tests/losses/test_formulas.py.

Names are TRL's where TRL has one, else the paper's. Symbols of the formulas: S sum and s mean of the token log-probs, R the
sum under the reference, n tokens, h = S - R, z = h_c - h_r; `_c` chosen, `_r` rejected; phi is the identity unless
`f_divergence` says otherwise.
"""

from lightning_pref.losses import absolute, finetuning, margins, reference_free, rewards, unlearning, unpaired
from lightning_pref.losses.spec import LossSpec

# One loss per pair: (PairLogps, *, options) -> [B].
PREFERENCE_LOSSES: dict[str, LossSpec] = {
    "sigmoid": LossSpec(
        fn=margins.sigmoid,
        formula="softplus(-beta * (phi(h_c) - phi(h_r)))",
        source="DPO, arXiv:2305.18290; other divergences f-DPO, arXiv:2309.16240",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `sigmoid` with `f_divergence_type`. `label_smoothing` is ignored there since 1.0, refused here: see `cdpo`.",
    ),
    "cdpo": LossSpec(
        fn=margins.cdpo,
        formula="(1 - eps) * softplus(-beta * z) + eps * softplus(beta * z)",
        source="Conservative DPO, ericmitchell.ai/cdpo.pdf",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL up to 0.25: `sigmoid` with `label_smoothing`; TRL CPO `sigmoid` with `label_smoothing` is this with R = 0.",
    ),
    "robust": LossSpec(
        fn=margins.robust,
        formula="((1 - eps) * softplus(-beta * z) - eps * softplus(beta * z)) / (1 - 2 * eps)",
        source="Robust DPO, arXiv:2403.00409",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `robust`, where `label_smoothing` is 0 by default and the loss then DPO.",
    ),
    "hinge": LossSpec(
        fn=margins.hinge,
        formula="max(0, 1 - beta * z)",
        source="SLiC, arXiv:2305.10425; RSO's hinge-norm, arXiv:2309.06657",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `hinge`. TRL CPO `hinge` is this with R = 0.",
    ),
    "ipo": LossSpec(
        fn=margins.ipo,
        formula="(h_c / n_c - h_r / n_r - 1 / (2 * beta))^2; without length_normalize (z - 1 / (2 * beta))^2",
        source="IPO, arXiv:2310.12036, eq. 17; beta is its tau",
        reward=rewards.ipo_log_ratio,
        needs_reference=True,
        length="option",
        peers="TRL `ipo` is per token as here by default. The paper's text and the DPO authors' code take sums. "
        "TRL CPO `ipo` is this with R = 0.",
    ),
    "exo_pair": LossSpec(
        fn=margins.exo_pair,
        formula="q * (log q - log(1 - eps)) + (1 - q) * (log(1 - q) - log eps), q = sigmoid(beta * z)",
        source="EXO, arXiv:2402.00856, eq. 16",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `exo_pair`, where `label_smoothing` has to be set; here it is 1e-3.",
    ),
    "nca_pair": LossSpec(
        fn=absolute.nca_pair,
        formula="softplus(-beta * h_c) + softplus(beta * h_c) / 2 + softplus(beta * h_r) / 2",
        source="NCA, arXiv:2402.05369",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `nca_pair`.",
    ),
    "bco_pair": LossSpec(
        fn=absolute.bco_pair,
        formula="softplus(-(beta * h_c - delta)) + softplus(beta * h_r - delta)",
        source="BCO, arXiv:2404.04656",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `bco_pair` has no delta since 1.0 (0 here by default); up to 0.25 it kept a running mean.",
    ),
    "sppo_hard": LossSpec(
        fn=absolute.sppo_hard,
        formula="(h_c - (P - 1/2) / beta)^2 + (h_r + (P - 1/2) / beta)^2",
        source="SPPO, arXiv:2405.00675, eq. 4.7; P is `preference`, 1 for hard labels",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `sppo_hard` has P = 1 only. Some codes halve the loss.",
    ),
    "apo_zero": LossSpec(
        fn=absolute.apo_zero,
        formula="sigmoid(-beta * h_c) + sigmoid(beta * h_r)",
        source="APO, arXiv:2408.06266, eq. 7",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `apo_zero`.",
    ),
    "apo_down": LossSpec(
        fn=absolute.apo_down,
        formula="sigmoid(beta * h_c) + sigmoid(-beta * z)",
        source="APO, arXiv:2408.06266, eq. 8",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `apo_down`.",
    ),
    "aot": LossSpec(
        fn=margins.aot,
        formula="(1 - eps) * softplus(-beta * u) + eps * softplus(beta * u), u = sort(S_c - S_r) - sort(R_c - R_r)",
        source="AOT paired, arXiv:2406.05882",
        reward=rewards.log_ratio,
        needs_reference=True,
        num_coupled=8,
        peers="TRL `aot` since 1.0. In TRL up to 0.25 `aot` was this one and `aot_pair` the unpaired one.",
    ),
    "aot_unpaired": LossSpec(
        fn=margins.aot_unpaired,
        formula="(1 - eps) * softplus(-beta * u) + eps * softplus(beta * u), u = sort(h_c) - sort(h_r)",
        source="AOT unpaired, arXiv:2406.05882",
        reward=rewards.log_ratio,
        needs_reference=True,
        num_coupled=8,
        peers="TRL `aot_unpaired`; `aot_pair` up to 0.25.",
    ),
    "discopop": LossSpec(
        fn=margins.discopop,
        formula="(1 - m) * softplus(-u) + m * exp(-u), u = beta * z, m = sigmoid(u / tau)",
        source="DiscoPOP (log-ratio modulated loss), arXiv:2406.08414, eq. 5",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL `discopop`, `tau` is its `discopop_tau`; there exp(-u) overflows below u = -88, here it goes on as a tangent.",
    ),
    "sigmoid_norm": LossSpec(
        fn=margins.sigmoid_norm,
        formula="softplus(-beta * (phi(h_c) / n_c - phi(h_r) / n_r))",
        source="Length-normalised DPO, arXiv:2411.15124",
        reward=rewards.mean_log_ratio,
        needs_reference=True,
        length="mean",
        peers="TRL `sigmoid_norm`, under TRL's general default beta = 0.1; 5 here.",
    ),
    "simpo": LossSpec(
        fn=reference_free.simpo,
        formula="softplus(-(beta * (s_c - s_r) - gamma))",
        source="SimPO, arXiv:2405.14734",
        reward=rewards.mean,
        length="mean",
        peers="TRL CPO `simpo` with `simpo_gamma`, under beta = 0.1, gamma = 0.5; the authors use beta 2 to 10 and a "
        "`gamma_beta_ratio` = gamma / beta of 0.1 to 0.8.",
    ),
    "alphapo": LossSpec(
        fn=reference_free.alphapo,
        formula="softplus(-(beta * (rho(s_c) - rho(s_r)) - gamma)), rho(s) = (1 - exp(-alpha * s)) / alpha",
        source="AlphaPO, arXiv:2501.03884",
        reward=rewards.inverse_power,
        length="mean",
        peers="TRL CPO `alphapo`; `alpha=0` is `simpo` in both.",
    ),
    "orpo": LossSpec(
        fn=reference_free.orpo,
        formula="-s_c + beta * softplus(-(o_c - o_r)), o = s - log(1 - exp(s))",
        source="ORPO, arXiv:2403.07691; beta is its lambda",
        reward=rewards.log_odds,
        length="mean",
        peers="TRL ORPO takes the NLL over prompt and response, a mean over the tokens of the batch; it logs beta * s as reward.",
    ),
    "cpo": LossSpec(
        fn=reference_free.cpo,
        formula="softplus(-beta * (S_c - S_r)) - alpha * S_c",
        source="CPO, arXiv:2401.08417",
        reward=rewards.summed,
        peers="TRL CPO `sigmoid` with `cpo_alpha`, where the NLL is the mean over the tokens of the batch.",
    ),
    "slic_hf": LossSpec(
        fn=reference_free.slic_hf,
        formula="max(0, delta - S_c + S_r) - alpha * S_c",
        source="SLiC-HF, arXiv:2305.10425; alpha is its lambda, the chosen response its target",
        reward=rewards.summed,
    ),
    "rrhf": LossSpec(
        fn=reference_free.rrhf,
        formula="max(0, s_r - s_c) - alpha * s_c",
        source="RRHF, arXiv:2304.05302, for two responses",
        reward=rewards.mean,
        length="mean",
    ),
    "dpop": LossSpec(
        fn=margins.dpop,
        formula="softplus(-beta * (z - penalty * max(0, R_c - S_c)))",
        source="DPO-positive (Smaug), arXiv:2402.13228; penalty is its lambda",
        reward=rewards.displacement_penalized,
        needs_reference=True,
    ),
    "rdpo": LossSpec(
        fn=margins.rdpo,
        formula="softplus(-(beta * z + alpha * (n_c - n_r)))",
        source="Length-regularised DPO, arXiv:2403.19159",
        reward=rewards.length_penalized,
        needs_reference=True,
        length="mixed",
    ),
    "rpo": LossSpec(
        fn=margins.rpo,
        formula="softplus(-beta * z) - alpha * s_c",
        source="Iterative RPO, arXiv:2404.19733; the pessimistic one, arXiv:2405.16436, is beta=0.01, alpha=0.005",
        reward=rewards.log_ratio,
        needs_reference=True,
        length="mixed",
        peers="TRL: `loss_type=['sigmoid', 'sft']`, whose `sft` is a mean over the tokens of the batch; `rpo_alpha` up to 0.25.",
    ),
    "mpo": LossSpec(
        fn=margins.mpo,
        formula="0.8 * sigmoid + 0.2 * bco_pair + sft",
        source="MPO, arXiv:2411.10442",
        reward=rewards.log_ratio,
        needs_reference=True,
        length="mixed",
        peers="TRL: `loss_type=['sigmoid', 'bco_pair', 'sft']`, `loss_weights=[0.8, 0.2, 1.0]`. Other weights here: `LossMix`.",
    ),
    "flex": LossSpec(
        fn=margins.flex,
        formula="softplus(-(beta_chosen * h_c - beta_rejected * h_r))",
        source="Flex-DPO (3D-properties of DPO), arXiv:2406.07327",
        reward=rewards.split_beta,
        needs_reference=True,
    ),
    "inpo": LossSpec(
        fn=margins.inpo,
        formula="(d(S) - tau / eta * d(R) - (1 - tau / eta) * d(previous) - 1 / (2 * eta))^2, d(.) chosen less rejected",
        source="INPO, arXiv:2407.00617",
        reward=rewards.against_two,
        needs_reference=True,
    ),
    "sft": LossSpec(
        fn=reference_free.sft,
        formula="-s_c",
        source="Maximum likelihood of the chosen response",
        reward=rewards.mean,
        length="mean",
        peers="TRL `sft` is the mean over the tokens of the batch: a long response counts more, and accumulation changes it.",
    ),
    "kto": LossSpec(
        fn=absolute.kto,
        formula="lambda_D * sigmoid(-beta * (h_c - baseline)) + lambda_U * sigmoid(beta * (h_r - baseline))",
        source="KTO, arXiv:2402.01306, eq. 7, of both responses; for labelled single responses see the unpaired losses",
        reward=rewards.log_ratio,
        needs_reference=True,
        peers="TRL's KTOTrainer on the two responses as single rows, times 2 (it takes the mean over rows).",
    ),
    "npo": LossSpec(
        fn=absolute.npo,
        formula="2 / beta * softplus(beta * h_r)",
        source="NPO, arXiv:2404.05868, of the rejected response",
        reward=rewards.log_ratio,
        needs_reference=True,
    ),
    "simnpo": LossSpec(
        fn=absolute.simnpo,
        formula="2 / beta * softplus(beta * (s_r + gamma))",
        source="SimNPO, arXiv:2410.07163, of the rejected response",
        reward=rewards.mean,
        length="mean",
    ),
}

# One loss per labelled response: (logps, ref_logps, desirable, *, options) -> [N].
UNPAIRED_LOSSES: dict[str, LossSpec] = {
    "kto": LossSpec(
        fn=unpaired.kto,
        formula="lambda_D * sigmoid(-beta * (h - baseline)) if desirable, else lambda_U * sigmoid(beta * (h - baseline))",
        source="KTO, arXiv:2402.01306, eq. 7",
        needs_reference=True,
        num_coupled=2,
        peers="TRL KTO; its baseline, too, is the mean log-ratio of mismatched pairs, clamped at 0 and shared by all ranks.",
    ),
    "bco": LossSpec(
        fn=unpaired.bco,
        formula="softplus(-(beta * h - delta)) if desirable, else softplus(beta * h - delta)",
        source="BCO, arXiv:2404.04656",
        needs_reference=True,
        peers="TRL's BCOTrainer, which 1.16 no longer has.",
    ),
    "apo_zero_unpaired": LossSpec(
        fn=unpaired.apo_zero_unpaired,
        formula="sigmoid(-beta * h) if desirable, else sigmoid(beta * h)",
        source="APO, arXiv:2408.06266, eq. 7",
        needs_reference=True,
        peers="TRL KTO `apo_zero_unpaired`.",
    ),
}

# One loss per response to forget: (logps, ref_logps or lengths, *, options) -> [N].
FORGET_LOSSES: dict[str, LossSpec] = {
    "npo": LossSpec(
        fn=unlearning.npo,
        formula="2 / beta * softplus(beta * h)",
        source="NPO, arXiv:2404.05868",
        needs_reference=True,
        peers="Some benchmarks put differences of raw logits over the vocabulary in place of h; that is another loss.",
    ),
    "simnpo": LossSpec(
        fn=unlearning.simnpo,
        formula="2 / beta * softplus(beta * (s + gamma))",
        source="SimNPO, arXiv:2410.07163",
        length="mean",
        peers="The authors' code counts the tokens before the shift, one too many where the first token is a label.",
    ),
}

# One loss per prompt with K responses: (mean log-probs, ranks, mask, *, options) -> [P].
GROUP_LOSSES: dict[str, LossSpec] = {
    "align": LossSpec(
        fn=finetuning.align,
        formula="log(1 + sum exp(s_j - s_i)) over pairs with i better than j",
        source="AFT, arXiv:2309.02144",
        length="mean",
    ),
    "align_detached": LossSpec(
        fn=finetuning.align_detached,
        formula="log(1 + sum exp(constant(s_j) - s_i))",
        source="AFT with the detached constraint, arXiv:2309.02144",
        length="mean",
    ),
    "align_boundary": LossSpec(
        fn=finetuning.align_boundary,
        formula="log(1 + sum [exp(s_j - s_i) + exp(2 * B_j - s_i - s_j)]), B_j = min over i of s_i - beta, a constant",
        source="AFT with the boundary constraint, arXiv:2309.02144",
        length="mean",
    ),
}

# What people type -> the name here; for the hint in "unknown loss" only.
ALSO_CALLED: dict[str, str] = {
    "dpo": "sigmoid",
    "fdpo": "sigmoid",
    "f_dpo": "sigmoid",
    "c_dpo": "cdpo",
    "robust_dpo": "robust",
    "rso": "hinge",
    "slic": "hinge",
    "exo": "exo_pair",
    "nca": "nca_pair",
    "bco": "bco_pair",
    "sppo": "sppo_hard",
    "aot_pair": "aot_unpaired",
    "apo": "apo_zero",
    "apo_zero_unpaired": "apo_zero",
    "lrml": "discopop",
    "ln_dpo": "sigmoid_norm",
    "dpo_norm": "sigmoid_norm",
    "smaug": "dpop",
    "dpo_positive": "dpop",
    "r_dpo": "rdpo",
    "flex_dpo": "flex",
    "nll": "sft",
}
