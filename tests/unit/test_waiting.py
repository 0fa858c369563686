# SPDX-License-Identifier: Apache-2.0
"""How long a teacher may take, and what its loss is called."""

import pytest

from verl_gndpo.teacher.waiting import Patience, first_line


def test_the_limit_follows_the_longest_wait_unless_it_is_set():
    patience = Patience(None)
    limits = [patience.limit]
    for seconds in (1.0, 70.0, 2.0):
        patience.has_taken(seconds)
        limits.append(patience.limit)
    assert limits == [1800, 600, 700, 700]
    fixed = Patience(5.0)
    fixed.has_taken(70.0)
    assert fixed.limit == 5


@pytest.mark.parametrize(
    ("text", "line"),
    [("\n  no room  \nfor it", "ValueError: no room"), ("", "ValueError")],
)
def test_an_error_is_told_in_one_line_and_as_the_process_raised_it(text, line):
    error = ValueError(text)
    assert first_line(error) == line
    from_ray = RuntimeError("a traceback")
    from_ray.cause = error
    assert first_line(from_ray) == line
