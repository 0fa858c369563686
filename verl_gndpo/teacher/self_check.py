# SPDX-License-Identifier: Apache-2.0
"""The self-check: the first scores of a run against a plain forward pass of the same model.

The plain pass runs one row alone, with transformers' own attention, on one rank, and takes a log-softmax over all
logits. Packing, shared prompts, sequence parallelism and the chunked projection must not change the result by more than
rounding does.
"""

import torch
from tensordict import TensorDict

from verl_gndpo.teacher.rows import name_of

TOKENS = 8
"""Response tokens that are compared on each rank."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""In nats: of each token in float32, of the mean in other dtypes.

Two ways to add up the same float32 numbers differ by about 1e-5, so each token is held to 1e-3. bfloat16 has 8 bits:
28 layers of random weights differ by up to 0.5 at single tokens and by up to 0.18 in the mean of 8, which is why the
mean counts there. Logits in float32, which the scores have on CUDA and the plain pass has not, do not narrow that: most
of the difference is the layers'. In 28 layers of width 256, on a CPU, the largest mean of 8 is 0.060 with logits in
bfloat16, and 0.058 with logits in float32 in both passes. float16 has three bits more. A wrong mask, position or image
moves log-probs by far more."""


def choose_row(data: TensorDict) -> int:
    """Choose the row to check: the one with the shortest prompt.

    Rows that verl added as padding, of which no token was sampled, are chosen only if there is no other.
    """
    prompts = (data["input_ids"].offsets().diff() - data["response_mask"].offsets().diff()).tolist()
    sampled = [bool(mask.any()) for mask in data["response_mask"].unbind()]
    return min(range(len(prompts)), key=lambda row: (not sampled[row], prompts[row]))


def compare(
    data: TensorDict,
    row: int,
    scores: torch.Tensor,
    expected: torch.Tensor,
    *,
    dtype: torch.dtype,
    model: str,
    attention: str,
) -> None:
    """Compare scores with those of the plain pass. All ranks call this together; the first prints the result.

    Args:
        data: this rank's batch.
        row: of the batch.
        scores, expected: (tokens,), log-probs of the first tokens of the row's response, nats.
        dtype: that the model computes in.
        model: the teacher's path, for the message.
        attention: transformers' attention implementation in the plain pass, for the message.

    Raises:
        ValueError: the scores differ by more than rounding explains.
    """
    count = len(scores)
    difference = (scores - expected).abs()
    largest = difference.amax() if count else difference.new_zeros(())
    # Before anything is raised: the other ranks wait here.
    summary = torch.stack([largest, difference.new_tensor(count)])
    summaries = [torch.empty_like(summary) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(summaries, summary)
    if torch.distributed.get_rank() == 0:
        differences, counts = torch.stack(summaries).unbind(1)
        print(
            f"teacher {model}: {int(counts.sum())} log-probs of the first batch differ by at most "
            f"{differences.max():.2g} nats from a plain forward pass ({attention} attention)"
        )
    by_token = dtype == torch.float32
    measured = largest if by_token or not count else difference.mean()
    # Every comparison with NaN is false.
    if not measured <= TOLERANCE[dtype]:
        token = int(difference.nan_to_num(float("inf")).argmax())
        ids, mask = data["input_ids"].unbind()[row], data["response_mask"].unbind()[row]
        raise ValueError(
            f"{name_of(data, row)}: the teacher's self-check failed. Token {token} of the response (id "
            f"{int(ids[len(ids) - len(mask) + token])}) has the log-prob {scores[token].item():.6f} in the packed "
            f"batch and {expected[token].item():.6f} in a plain forward pass of its row. In "
            f"{str(dtype).split('.')[-1]} {'a token' if by_token else f'the mean over {count} tokens'} may differ by "
            f"{TOLERANCE[dtype]} nats, and here it differs by {measured.item():.3g}: the model does more with its "
            "inputs or in its attention than this teacher reproduces, and its scores would be wrong. "
            "teacher.self_check=False runs without this check"
        )
