"""Run the slow tests that every commit must pass, the cheapest and most valuable first, until the time is over.

``make test-slow`` runs all slow tests. These need less than 25 minutes on an idle machine with two cores.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import pytest

#: About how many seconds it takes on an idle machine with two cores (with all its parameters), and the test.
TESTS = (
    (5, "tests/test_packaging.py::test_a_wheel_holds_the_configs_and_composes_them"),
    (10, "tests/test_commands.py::test_without_a_hub_one_line_says_what_to_do"),
    (4, "tests/training/test_interruption.py::test_a_token_budget_resumes_in_the_middle_of_a_pass"),
    (15, "tests/training/test_interruption.py::test_resumed_run_is_bitwise_the_uninterrupted_one[SIGTERM]"),
    (85, "tests/studies/test_own_studies.py::test_every_stage_lacks_nothing_but_what_earlier_stages_make"),
    (25, "tests/training/test_losses.py::test_every_loss_trains_and_falls"),
    (15, "tests/evaluation/test_measures.py::test_evaluation_sets_of_a_training_and_of_evaluate"),
    (10, "tests/evaluation/test_measures.py::test_what_a_cache_lacks_is_loaded"),
    (10, "tests/test_generate.py::test_the_command_in_a_process_of_its_own"),
    (15, "tests/references/test_cache.py::test_the_command_in_a_process_of_its_own"),
    (20, "tests/test_commands.py::test_train_then_evaluate"),
    (35, "tests/test_commands.py::test_delta_kd_gpt2_from_a_hub_cache"),
    (40, "tests/docs/test_commands.py::test_the_commands_of_a_page_run_in_order[README]"),
    (60, "tests/docs/test_commands.py::test_the_commands_of_a_page_run_in_order[extend]"),
    (25, "tests/test_commands.py::test_identity_16_two_processes_are_one"),
    (70, "tests/test_console_script.py::test_two_processes_and_two_jobs_start_as_under_python_m"),
    (270, "tests/distributed/test_scale.py::test_two_processes_are_one"),
    (180, "tests/distributed/test_scale.py::test_another_number_of_processes"),
    (10, "tests/estimates/test_memory.py::test_a_dry_run_loads_and_writes_nothing"),
    (100, "tests/distributed/test_scale.py::test_references_of_each_rank"),
    (60, "tests/distributed/test_scale.py::test_answers_are_those_of_one_process"),
    (60, "tests/distributed/test_faults.py::test_a_killed_rank_is_named_and_the_run_goes_on[ddp-1]"),
    (60, "tests/studies/test_search.py::test_a_multirun_in_two_processes_and_its_resumption"),
    (50, "tests/studies/test_sweeps.py::test_a_real_agent_takes_two_runs_of_the_grid"),
    (70, "tests/distributed/test_many_machines.py::test_torchrun_on_one_machine_and_on_two"),
    (70, "tests/distributed/test_scale.py::test_a_checkpoint_cut_in_half_is_told_and_the_one_before_it_used"),
    (100, "tests/estimates/test_costs.py::test_a_real_step_takes_and_sends_what_is_estimated"),
)


class TimeLimit:
    """A pytest plugin that ends the tests when the time is over, without failing them.

    Args:
        seconds: how much time there is.
    """

    def __init__(self, seconds: float) -> None:
        self.unreached: list[str] = []
        self._end = time.monotonic() + seconds
        self._running = ""
        signal.signal(signal.SIGALRM, self._stop)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Leave out a test that would begin too late."""
        if time.monotonic() < self._end:
            return None
        self.unreached.append(item.nodeid)
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Interrupt a test that is still running at the end."""
        self._running = item.nodeid
        signal.setitimer(signal.ITIMER_REAL, max(self._end - time.monotonic(), 0.001))
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _stop(self, signum: int, frame: FrameType | None) -> NoReturn:
        self.unreached.append(f"{self._running} (interrupted)")
        pytest.skip("out of time")


def main() -> int:
    """Run the tests; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40 * 60, help="time for all of them (default: 40 minutes)")
    parser.add_argument("tests", nargs="*", metavar="TEST", help="in place of the list in this file")
    given = parser.parse_args()
    limit = TimeLimit(given.seconds)
    tests = given.tests or [test for _, test in TESTS]
    # Whatever their markers: the ones that are listed run.
    status = pytest.main(["-m", "", "-vv", "--durations=0", *tests], plugins=[limit])
    if limit.unreached:
        print(f"out of time, {len(limit.unreached)} of the slow tests were not reached: {', '.join(limit.unreached)}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
