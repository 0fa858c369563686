# SPDX-License-Identifier: Apache-2.0
"""KL(student || teacher) from the student's k most likely tokens: what `algorithm.gndpo.baseline=kl` subtracts.

Both distributions are cut into k + 1 parts: the student's k most likely tokens, and one for all others. Merging tokens
into one part can only lower a KL divergence, so that this is a lower bound of the exact one, grows with k, and is exact
where k is the size of the vocabulary. The functions are pure. The student's side is
`verl_patches.student_top_k`, the teacher's `teacher.scoring`.
"""

import math

import torch

# Fields that the student's pass stores per response token for the teacher; and the entry of a batch that requests them,
# which holds k.
IDS, LOG_PROBS, REQUEST = "student_top_ids", "student_top_log_probs", "student_top_k"

# Smallest positive float32. A part that is impossible for the teacher would make the divergence infinite.
_LEAST = torch.finfo(torch.float32).tiny


def top_log_probs(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k most likely tokens, and the mass of all others.

    Args:
        logits: (tokens, vocabulary), divided by the temperature.
        k: at least 1; more than the vocabulary holds means all of it.

    Returns:
        ids: (tokens, k), int64.
        log_probs: (tokens, k + 1), float32, nats; the last is the log of the others' mass, -inf where there are none.
    """
    log_probs = logits.float().log_softmax(-1)
    chosen, ids = log_probs.topk(min(k, log_probs.shape[-1]), dim=-1)
    rest = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat([chosen, rest], -1)


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return KL(student || teacher) over k tokens and one part for all others.

    Args:
        student, teacher: (..., k + 1), log-probs of the same tokens and the log-mass of all others, nats. A token
            that the teacher's vocabulary lacks has -inf there, and counts among the others.

    Returns:
        (...,), float32, nats, at least 0.
    """
    student, teacher = student.float(), teacher.float()
    unknown = teacher == -torch.inf
    unknown[..., -1] = True
    others = student.masked_fill(~unknown, -torch.inf).logsumexp(-1, keepdim=True)
    student = torch.cat([student.masked_fill(unknown, -torch.inf)[..., :-1], others], -1)
    teacher = torch.cat([teacher[..., :-1], teacher[..., -1:].clamp(min=math.log(_LEAST))], -1)
    terms = torch.where(student > -torch.inf, student.exp() * (student - teacher), 0.0)
    return terms.sum(-1).clamp(min=0)
