# SPDX-License-Identifier: Apache-2.0
"""Test verl_gndpo.rewards with hostile model output: no error, no long wait, and the next answer is graded as usual."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from verl_gndpo.rewards import compute_score, symbolic
from verl_gndpo.rewards.extract import answers_of, well_formed
from verl_gndpo.rewards.graders import GRADERS, grade

TRUTHS = {"number": "12.5", "math": "2n+1", "choice": "B", "multi_choice": "A, C", "list": "1; x", "text": "yes"}
MEGABYTE = 1_000_000


def fresh_pair(number: int) -> tuple[str, str]:
    """Return a right answer and its truth, which only computer algebra decides and no cache holds."""
    return f"(x+{number})^2", f"x^2+{2 * number}x+{number * number}"


def new_helper(monkeypatch, time_limit_s: float) -> symbolic._Helper:
    """Return the helper that grades from now on. It reads the limit when it starts its process."""
    helper = symbolic._Helper()
    monkeypatch.setattr(symbolic, "_helper", helper)
    monkeypatch.setattr(symbolic, "TIME_LIMIT_S", time_limit_s)
    symbolic.equal.cache_clear()
    return helper


@pytest.fixture
def short_limits(monkeypatch):
    """Yield a new helper with half a second of processor time per comparison."""
    helper = new_helper(monkeypatch, 0.5)
    yield helper
    helper.close()


def processor_seconds() -> float:
    """Return the processor time of this process and its helper's ended children: a busy machine doesn't change it."""
    spent = time.process_time()
    if symbolic._helper.process is not None:
        children = psutil.Process(symbolic._helper.process.pid).cpu_times()
        spent += children.children_user + children.children_system
    return spent


def seconds(function, *arguments) -> float:
    start = processor_seconds()
    function(*arguments)
    return processor_seconds() - start


JUNK = [
    None,
    b"\xff\\boxed{5}",
    5,
    float("nan"),
    object(),
    "",
    "\0",
    "\\boxed{\0}",
    "\ud800",
    "\\boxed{\ud800\udfff}",
    "\\boxed{}",
    "\\boxed{nan}",
    "\\boxed{inf}",
    "\\boxed{-\\infty}",
    "\\boxed{1e999}",
    "\\boxed{0/0}",
    "\\boxed{0^{-1}}",
    "\\boxed{\\sqrt[0]{5}}",
    "\\boxed{(-8)^{1/3}}",
    "\\boxed{" + "9" * 900 + "}",
    "\\boxed{" + "9" * 5_000 + "}",
    "\\boxed{1/" + "9" * 390 + "}",
    "\\boxed{٣½²①%}",
    "\\boxed{" + "ﷺ" * 3_000 + "}",
    "\\boxed{" + "(" * 3_000 + "}",
    "\\boxed{" + "(" * 25 + "1,2" + ")" * 25 + "}",
    "\\boxed{" + "\\sqrt" * 700 + "2}",
    "\\boxed{" + "\\frac" * 700 + "}",
    "\\boxed{" + "-" * 3_000 + "1}",
    "\\boxed{" + "2^" * 1_500 + "2}",
    "\\boxed{" + "x=" * 1_500 + "2}",
    "\\boxed{" + "1:" * 1_500 + "2}",
    "\\boxed{" + "1," * 1_900 + "2}",
    "\\boxed{" + "\\text{" * 500 + "}" * 500 + "}",
    "\\boxed{" + " " * 3_900 + "x}",
    "\\boxed{" + "a " * 1_900 + "}",
    "\\boxed" * 100_000,
    "\\boxed{" * 140_000,
    "\\boxed{" * 70_000 + "}" * 70_000,
    "{" * MEGABYTE,
    "}" * MEGABYTE,
    "9" * MEGABYTE,
    "<think>" * 140_000,
    "<think>" + "</think>\\boxed{" * 60_000,
    "</think>" * 120_000,
    "<answer>" * 120_000,
    "the answer is " * 70_000,
    "answer " * 140_000,
    "\\boxed " * 140_000,
    "boxed" + " " * MEGABYTE,
    "\n" * MEGABYTE,
]


@pytest.mark.parametrize("kind", GRADERS)
def test_junk_is_graded_zero_and_soon(kind, short_limits):
    for junk in JUNK:
        start = processor_seconds()
        graded = compute_score("any", junk, TRUTHS[kind], {"answer_type": kind})
        assert graded["acc"] == 0.0, repr(junk)[:80]
        assert processor_seconds() - start < 6.0, repr(junk)[:80]


HOSTILE = [
    "9^{9^{9^{9}}}",
    "10^{10^{10}}",
    "100000!",
    "9^9^9^9",
    "x^{9999999}",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\binom{1000000000}{500000000}",
    "\\sum_{k=1}^{10^9} k^k",
    "(x+y+z+1)^{300}",
    "((999^{999})^{999})^{999}",
    "(" * 25 + "x" + ")" * 25,
    "\\int_0^{100} e^{x^2}\\sin(x^3) dx",
    "\\begin{pmatrix}" + "\\\\".join("&".join(["x"] * 20) for _ in range(10)) + "\\end{pmatrix}",
]


@pytest.mark.parametrize("expression", HOSTILE)
def test_hostile_expression_is_graded_zero_within_its_limits(expression, short_limits):
    assert seconds(grade, "math", expression, "2n+1", [], 0.0) < 3.0
    assert not grade("math", expression, "2n+1", [], 0.0)
    assert grade("math", *fresh_pair(3), [], 0.0), "the answer after a hostile one is graded as usual"


def test_timeout_is_counted_warned_about_once_and_not_repeated(short_limits, monkeypatch, caplog):
    monkeypatch.setattr(symbolic, "timeouts", 0)
    with caplog.at_level(logging.WARNING, logger=symbolic.logger.name):
        for base in (1_000_000_001, 1_000_000_003):
            assert not grade("math", f"\\binom{{{base}}}{{500000000}}", "n", [], 0.0)
        assert seconds(grade, "math", f"\\binom{{{base}}}{{500000000}}", "n", [], 0.0) < 0.1
    assert symbolic.timeouts == 2
    assert [record.getMessage()[:34] for record in caplog.records] == ["a symbolic comparison ran out of i"]


def test_memory_is_bounded_and_the_next_answer_graded(short_limits):
    assert grade("math", *fresh_pair(5), [], 0.0)
    (child,) = psutil.Process(short_limits.process.pid).children()
    assert child.rlimit(psutil.RLIMIT_AS) == (symbolic.MEMORY_LIMIT_BYTES,) * 2
    assert not grade("math", "(x+y+z+w)^{400}", "2n+1", [], 0.0)
    assert grade("math", *fresh_pair(6), [], 0.0)


def test_start_of_the_helper_does_not_count_into_the_time_of_an_answer(short_limits, monkeypatch):
    start = short_limits._start

    def slowly():
        time.sleep(1.0)
        return start()

    monkeypatch.setattr(short_limits, "_start", slowly)
    assert grade("math", *fresh_pair(7), [], 0.0)
    assert symbolic.TIME_LIMIT_S < 1.0


def test_first_answer_after_a_kill_costs_as_little_as_any_other(monkeypatch):
    # Half of what a first comparison costs, and many times what this one costs.
    helper = new_helper(monkeypatch, 0.13)
    assert not grade("math", "\\binom{1000000007}{500000000}", "n", [], 0.0)
    assert grade("math", *fresh_pair(8), [], 0.0)
    helper.close()


def test_many_threads_at_once_get_their_own_answers():
    symbolic.equal.cache_clear()

    def one(number: int) -> bool:
        answer, truth = fresh_pair(number)
        if number % 3 == 0:
            truth = truth.replace("+", "-", 1)
        return grade("math", answer, truth, [], 0.0) is (number % 3 != 0)

    with ThreadPoolExecutor(24) as pool:
        wrong = [number for number, good in enumerate(pool.map(one, range(10, 130)), 10) if not good]
    assert not wrong


def test_limits_hold_where_the_asking_thread_blocks_signals(short_limits):
    def ask():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF, signal.SIGALRM})
        verdicts.append(grade("math", "\\binom{1000000007}{500000000}", "n", [], 0.0))

    verdicts = []
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(120)
    assert verdicts == [False]


def test_a_killed_helper_is_replaced(short_limits):
    assert grade("math", *fresh_pair(200), [], 0.0)
    os.kill(short_limits.process.pid, signal.SIGKILL)
    short_limits.process.wait()
    assert grade("math", *fresh_pair(201), [], 0.0)


def test_an_interrupted_request_does_not_leave_its_reply_to_the_next(short_limits, monkeypatch):
    assert grade("math", *fresh_pair(300), [], 0.0)

    class Interruption(BaseException):
        """Stands for KeyboardInterrupt, which would end pytest if the test failed."""

    class Interrupted:
        def __init__(self, pipe):
            self.pipe = pipe

        def write(self, request):
            self.pipe.write(request)
            raise Interruption

        def close(self):
            self.pipe.close()

    monkeypatch.setattr(short_limits.process, "stdin", Interrupted(short_limits.process.stdin))
    with pytest.raises(Interruption):
        grade("math", *fresh_pair(301), [], 0.0)
    assert not grade("math", "x+1", "x+2", [], 0.0)


def test_a_helper_that_cannot_start_is_an_error_that_says_what_to_install(monkeypatch):
    helper = symbolic._Helper()
    monkeypatch.setattr(symbolic, "_helper", helper)
    monkeypatch.setattr(symbolic.sys, "executable", "/bin/false")
    symbolic.equal.cache_clear()
    with pytest.raises(RuntimeError, match="math-verify"):
        grade("math", *fresh_pair(400), [], 0.0)


def _grade_in_child(results):
    results.put([grade("math", *fresh_pair(number), [], 0.0) for number in (500, 501)])


def test_a_forked_process_gets_a_helper_of_its_own():
    assert grade("math", *fresh_pair(499), [], 0.0)
    before = symbolic._helper.process.pid
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    # The lock is held as if another thread were asking while the process forks.
    with symbolic._helper.lock:
        child = context.Process(target=_grade_in_child, args=(results,))
        child.start()
    assert results.get(timeout=300) == [True, True]
    child.join(120)
    assert child.exitcode == 0
    assert grade("math", *fresh_pair(502), [], 0.0)
    assert symbolic._helper.process.pid == before


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL])
def test_the_helper_ends_with_its_process(ending):
    code = (
        "import sys, time\nfrom verl_gndpo.rewards import symbolic\nfrom verl_gndpo.rewards.graders import grade\n"
        "assert grade('math', '1+2n', '2n+1', [], 0.0)\nprint(symbolic._helper.process.pid, flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    helper = psutil.Process(int(process.stdout.readline()))
    family = [helper, *helper.children()]
    assert len(family) == 2
    process.send_signal(ending)
    process.wait()
    process.stdout.close()
    assert psutil.wait_procs(family, timeout=120)[1] == []


def test_typical_answers_take_well_under_a_millisecond_where_no_algebra_is_needed():
    pairs = [("12 cm", "12"), ("\\frac{28\\sqrt{3}}{3}", "\\frac { 28 \\sqrt {3} } { 3 }"), ("(7,3)", "(7, 3)")]
    count = 300
    start = time.process_time()
    for _ in range(count):
        for answer, truth in pairs:
            assert grade("math", answer, truth, [], 0.0)
    # 0.1 ms measured; the bound leaves room for a slow machine.
    assert (time.process_time() - start) / count / len(pairs) < 0.003


FRAGMENTS = st.sampled_from(
    [
        *[
            "\\boxed{",
            "}",
            "{",
            "(",
            ")",
            "[",
            "]",
            "\\{",
            "\\}",
            "\\frac",
            "\\sqrt",
            "\\text{",
            "^",
            "_",
            "=",
            ":",
            ";",
        ],
        *[
            "\\begin{pmatrix}",
            "\\end{pmatrix}",
            "&",
            "\\\\",
            "\n",
            ",",
            " and ",
            " or ",
            "<",
            "\\le ",
            "\\cup ",
            "\\pm ",
        ],
        *[
            "1",
            "23",
            "4.5",
            "1e5",
            "x",
            "n",
            "\\pi",
            "°",
            "%",
            " cm",
            "$",
            "A",
            "(B)",
            "\\sin",
            "\\ln",
            "!",
            "+",
            "-",
            "/",
        ],
    ]
)
EXPRESSIONS = st.lists(FRAGMENTS, max_size=12).map("".join)
no_fixture_worry = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(no_fixture_worry, max_examples=300)
@given(st.text(max_size=300) | EXPRESSIONS)
def test_extraction_never_raises(response):
    assert all(isinstance(answer, str) for answer in answers_of(response))
    assert isinstance(well_formed(response), bool)


@pytest.mark.parametrize("kind", GRADERS)
def test_fuzzed_answers_never_raise_nor_take_long(kind, short_limits):
    @settings(no_fixture_worry, max_examples=120)
    @given(st.text(max_size=60) | EXPRESSIONS, st.sampled_from(["12.5", "2n+1", "B", "(1, 2)", "1;x", "\\{x>1\\}"]))
    def run(answer, truth):
        assert seconds(grade, kind, answer, truth, ["1", "x", "yes"], 0.0) < 6.0

    run()


@settings(no_fixture_worry, max_examples=150)
@given(EXPRESSIONS.filter(str.strip), st.sampled_from(list(GRADERS)))
def test_every_truth_accepts_itself(truth, kind):
    assert grade(kind, truth, truth, [], 0.0)
    assert grade(kind, f" {truth}\t", truth, [], 0.0)


@settings(no_fixture_worry, max_examples=300)
@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_integers_are_equal_only_to_themselves(answer, truth):
    for kind in ("number", "math"):
        assert grade(kind, f"{answer}", f"{truth}", [], 0.0) is (answer == truth)
        assert grade(kind, f"{answer:,} cm", f"x = {truth}.0", [], 0.0) is (answer == truth)


def test_a_helper_outlives_the_thread_that_started_it():
    thread = threading.Thread(target=grade, args=("math", *fresh_pair(600), [], 0.0))
    thread.start()
    thread.join()
    assert grade("math", *fresh_pair(601), [], 0.0)
    assert symbolic._helper.process.poll() is None
