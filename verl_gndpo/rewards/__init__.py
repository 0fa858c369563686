# SPDX-License-Identifier: Apache-2.0
"""Grade answers of multimodal reasoning sets: a function for verl's `reward.custom_reward_function`.

    reward.custom_reward_function.path=pkg://verl_gndpo.rewards
    reward.custom_reward_function.name=compute_score

verl 0.9.1 calls it from the executor threads of its reward workers, so it is thread-safe and never waits for long. Each
key of the returned dict becomes a validation metric, `acc` the main one, and all rows must have the same keys.

The modules, in the order in which a response passes through them:

    extract.py         find the answer, check the form; prose.py finds it in words
    answer_types.py    the kinds of answer, and the kind of each data source
    graders.py         one grader for each kind
    spelling.py        one spelling for LaTeX, Unicode and plain text
    choices.py         which choice a letter or a text names
    quantity.py        real numbers with units
    expressions.py     mathematics, as far as spelling, numbers and structure decide; structure.py splits it into parts
    symbolic.py        the helper process for everything else; algebra.py runs in it
"""

from collections.abc import Mapping
from typing import Any

from .answer_types import ANSWER_TYPE_OF_SOURCE, ANSWER_TYPES, NO_ANSWER
from .extract import answers_of, well_formed
from .graders import grade


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    *,
    format_score: float = 0.1,
    response_prefix: str = "",
    **kwargs: Any,
) -> dict[str, float]:
    """Grade one response, weighing answer and format as verl's own geo3k reward does.

    Args:
        data_source: the row's data set, a key of `ANSWER_TYPE_OF_SOURCE` unless `extra_info` names the answer type.
        solution_str: the model's response. It never causes an error.
        ground_truth: the row's answer, as its data set writes it.
        extra_info: may hold `answer_type` (one of `ANSWER_TYPES`; "" for the source's), `choices` (the texts of
            the choices A, B, C, ... in order), `tolerance` (largest absolute error of a number; 0 for the default) and
            `response_prefix` (what the prompt ends with and belongs to the response, such as `<think>`).
        format_score: weight of the format; `reward.custom_reward_function.reward_kwargs.format_score` sets it.
        response_prefix: as in `extra_info`, which wins. This project's reward manager finds it out; under a manager of
            verl's, such as dapo, `reward.custom_reward_function.reward_kwargs.response_prefix` sets it.
        kwargs: other arguments of verl's (the reward model's address and tokenizer), unused.

    Returns:
        Only score, which is 0, where `extra_info.answer_type` is "none", or where neither it nor the ground truth is
        given. Otherwise:

        score: `(1 - format_score) * acc + format_score * format`.
        acc: 1.0 if the answer is right, else 0.0.
        format: 1.0 for `<think>...</think>...\\boxed{...}`, else 0.0.

    Raises:
        ValueError: the data source has no answer type, the answer type is unknown, or it is given without a ground
            truth.
        RuntimeError: the helper process for symbolic comparison doesn't start.
    """
    extra_info = extra_info or {}
    named = _given(extra_info, "answer_type", NO_ANSWER if is_missing(ground_truth) else "")
    if named == NO_ANSWER:
        return {"score": 0.0}
    if not isinstance(ground_truth, str) or not ground_truth.strip():
        raise ValueError(
            f"reward_model.ground_truth of a row of data_source {data_source!r} is {ground_truth!r}: "
            "it must be a non-empty string; drop the row or fix it where the parquet file is written"
        )
    choices = [str(choice) for choice in _given(extra_info, "choices", [])]
    answer_type = _answer_type(data_source, ground_truth, choices, extra_info)
    prefix = str(_given(extra_info, "response_prefix", response_prefix))
    text = prefix + solution_str if isinstance(solution_str, str) else ""
    tolerance = float(_given(extra_info, "tolerance", 0.0))
    acc = float(any(grade(answer_type, answer, ground_truth, choices, tolerance) for answer in answers_of(text)))
    form = float(well_formed(text))
    return {"score": (1.0 - format_score) * acc + format_score * form, "acc": acc, "format": form}


def is_missing(ground_truth: Any) -> bool:
    """Return True if a row's ground truth says that it has no answer."""
    return ground_truth is None or (isinstance(ground_truth, str) and not ground_truth.strip())


def _given(extra_info: Mapping[str, Any], key: str, default: Any) -> Any:
    # Parquet stores None for keys that a row lacks.
    value = extra_info.get(key)
    return default if value is None else value


def _answer_type(data_source: str, ground_truth: str, choices: list[str], extra_info: Mapping[str, Any]) -> str:
    named = _given(extra_info, "answer_type", "")
    if named:
        if named not in ANSWER_TYPES:
            raise ValueError(
                f"extra_info.answer_type {named!r} of a row of data_source {data_source!r} is unknown: "
                f"it must be one of {', '.join(ANSWER_TYPES)}"
            )
        return named
    if data_source not in ANSWER_TYPE_OF_SOURCE:
        raise ValueError(
            f"data_source {data_source!r} has no answer type: write extra_info.answer_type into its rows "
            f"(one of {', '.join(ANSWER_TYPES)}), or use a data_source of "
            "verl_gndpo.rewards.answer_types.ANSWER_TYPE_OF_SOURCE"
        )
    default = ANSWER_TYPE_OF_SOURCE[data_source]
    letter = ground_truth.strip().strip("$").strip()
    if default == "math" and (choices or (len(letter) == 1 and "A" <= letter <= "Z")):
        return "choice"
    return default
