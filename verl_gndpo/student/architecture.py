# SPDX-License-Identifier: Apache-2.0
"""Which students can share prompts: tried with a small model of the architecture, as for teachers."""

from typing import Any

from verl_gndpo.teacher.architecture import try_teacher
from verl_gndpo.teacher.scoring import UNCHANGED
from verl_gndpo.teacher.trial import NotTriedError, TrialError


def why_prompts_are_not_shared(hf_config: Any, path: str, *, trust_remote_code: bool) -> str | None:
    """Return why the responses of a student can't share their prompt through attention; None if they can.

    Args:
        hf_config: of the student.
        path: local folder or hub id, where its processor is.
    """
    options: dict[str, Any] = {"sharing": "attention", "trust_remote_code": trust_remote_code}
    try:
        try:
            verdict = try_teacher(hf_config, path, **options)
        except NotTriedError:
            raise
        except TrialError:
            # A run without images does without them.
            verdict = try_teacher(hf_config, path, images=False, **options)
    except NotTriedError as error:
        return f"its architecture can't be tried: {error}"
    except TrialError as error:
        return str(error)
    return None if verdict.change == UNCHANGED else "it changes its logits after the output projection"
