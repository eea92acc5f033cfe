from kedit_daemon.editing.memory_backoff import describe_failure
from memory.errors import KeditError


def test_the_reason_of_a_failure_is_a_sentence() -> None:
    assert describe_failure(KeditError("too long")) == "too long"
    made = describe_failure(ValueError("no such layer"))
    assert made == "unexpected: ValueError: no such layer"
