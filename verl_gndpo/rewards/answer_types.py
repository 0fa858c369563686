# SPDX-License-Identifier: Apache-2.0
"""Name the kinds of answer, and say which one applies to rows that don't name theirs.

Imports nothing, so that converters and start-up checks can use it.
"""

NO_ANSWER = "none"
"""The value of `extra_info.answer_type` for rows without an answer. Distillation needs none."""

ANSWER_TYPES = ("number", "math", "choice", "multi_choice", "list", "text", NO_ANSWER)
"""The values of `extra_info.answer_type`. `graders.GRADERS` has one grader for each, except for `NO_ANSWER`."""

ANSWER_TYPE_OF_SOURCE = {
    "hiyouga/geometry3k": "math",
    "FanqingM/MMK12": "math",
    "TIGER-Lab/ViRL39K": "math",
    "lmms-lab/multimodal-open-r1-8k-verified": "math",
    "leonardPKU/GEOQA_R1V_Train_8K": "math",
    "BUAADreamer/clevr_count_70k": "number",
    "MathLLMs/MathVision": "math",
    "AI4Math/MathVerse": "math",
    "AI4Math/MathVista": "math",
    "We-Math/We-Math": "choice",
    "lscpku/LogicVista": "multi_choice",
    "DynaMath/DynaMath_Sample": "math",
}
"""The answer type by `data_source`, for rows without `extra_info.answer_type`, such as those of verl's geo3k script.

A row whose type here is "math" is graded as "choice" when it has choices or its answer is a single capital letter.
"""
