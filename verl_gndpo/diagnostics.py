# SPDX-License-Identifier: Apache-2.0
"""What the signal of a step looked like, as a flat dict of numbers. Logs nothing itself."""

import numpy as np
import torch

from verl_gndpo.config import SignalConfig

# exp() of a larger log-ratio would dominate the k3 mean; verl bounds its own k3 estimator at the same value.
K3_MAX_LOG_RATIO = 20.0


def describe_signal(
    teacher_log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    response_mask: torch.Tensor,
    advantages: torch.Tensor,
    settings: SignalConfig,
) -> dict[str, float]:
    """Raw log-ratio, bounded signal and advantage, each described apart.

    Args:
        teacher_log_probs, old_log_probs, response_mask, advantages: (batch, response_length), as the estimator saw and
            returned them; at least one valid token, all valid tokens finite.
        settings: the resolved `algorithm.gndpo`.

    Returns:
        gndpo/log_ratio/{mean,std,min,max,p01,p99}: D = log pi_T - log pi_old, nats, before the bound;
        gndpo/clipped_low_share, gndpo/clipped_high_share: share of tokens with D beyond -clip and +clip;
        gndpo/mu, gndpo/sigma: mean and standard deviation (Bessel-corrected) of the bounded signal, nats;
        gndpo/gain: what the bounded signal was multiplied by, 1/sigma for gndpo;
        gndpo/advantage_abs_max; gndpo/sign_flip_share: share of tokens whose advantage and bounded signal differ in sign;
        gndpo/k1, gndpo/k3: estimates of KL(student || teacher) in nats: mean of -D and of exp(D) - 1 - D;
        gndpo/tokens: number of valid tokens.
    """
    valid = response_mask != 0
    d = (teacher_log_probs - old_log_probs)[valid].float()
    a = advantages[valid]
    n = d.numel()
    bessel = n / (n - 1) if n > 1 else 0.0
    std, mean = torch.std_mean(d, correction=0)
    low, high = torch.aminmax(d)
    p01, p99 = _quantiles(d, 0.01, 0.99)
    k = d if settings.clip is None else d.clamp(-settings.clip, settings.clip)
    sigma, mu = torch.std_mean(k, correction=0)
    sigma = sigma.item() * bessel**0.5
    gain = (sigma**2 + settings.std_floor**2) ** -0.5 if settings.scale and n > 1 else 1.0
    bound = float("inf") if settings.clip is None else settings.clip
    ratio = d.clamp(max=K3_MAX_LOG_RATIO).exp_()
    return {
        "gndpo/log_ratio/mean": mean.item(),
        "gndpo/log_ratio/std": std.item() * bessel**0.5,
        "gndpo/log_ratio/min": low.item(),
        "gndpo/log_ratio/max": high.item(),
        "gndpo/log_ratio/p01": p01,
        "gndpo/log_ratio/p99": p99,
        "gndpo/clipped_low_share": torch.count_nonzero(d < -bound).item() / n,
        "gndpo/clipped_high_share": torch.count_nonzero(d > bound).item() / n,
        "gndpo/mu": mu.item(),
        "gndpo/sigma": sigma,
        "gndpo/gain": gain,
        "gndpo/advantage_abs_max": max(abs(x.item()) for x in torch.aminmax(a)),
        "gndpo/sign_flip_share": torch.count_nonzero(a * k < 0).item() / n,
        "gndpo/k1": -mean.item(),
        "gndpo/k3": ratio.mean().item() - 1.0 - d.clamp(max=K3_MAX_LOG_RATIO).mean().item(),
        "gndpo/tokens": float(n),
    }


def _quantiles(x: torch.Tensor, *levels: float) -> list[float]:
    """Nearest-rank quantiles: one partial sort in numpy, which torch does not have."""
    ranks = [min(int(level * len(x)), len(x) - 1) for level in levels]
    values = np.partition(x.cpu().numpy(), ranks)
    return [float(values[rank]) for rank in ranks]
