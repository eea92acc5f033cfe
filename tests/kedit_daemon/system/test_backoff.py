"""The wait between attempts doubles up to its limit, and starts again after a success."""

from itertools import pairwise

from kedit_daemon.system.backoff import Backoff


class Seconds:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_wait_doubles_up_to_the_limit_and_starts_again_after_a_reset() -> None:
    backoff = Backoff(3.0, 20.0, Seconds())
    assert [backoff.record_failure() for _ in range(5)] == [3.0, 6.0, 12.0, 20.0, 20.0]
    for _ in range(5000):  # a failure that lasts for months
        assert backoff.record_failure() == 20.0
    backoff.reset()
    assert backoff.record_failure() == 3.0


def test_the_first_attempt_is_due_at_once_and_each_further_one_after_its_wait() -> None:
    clock = Seconds()
    backoff, attempts = Backoff(1.0, 4.0, clock), list[float]()
    for _ in range(12):
        if backoff.is_due():
            attempts.append(clock.now)
            backoff.record_failure()
        clock.now += 1.0
    assert [after - before for before, after in pairwise(attempts)] == [1.0, 2.0, 4.0, 4.0]
    backoff.reset()
    assert backoff.is_due()
