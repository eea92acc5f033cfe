from kedit_daemon.serve.dashboard.health_series import Measurement, build_charts
from policies.health_limits import Limits, Thresholds

LIMITS = Limits(1.1, 1.2, 1.3)
SHARES = Limits(0.02, 0.03, 0.10)
THRESHOLDS = Thresholds(LIMITS, LIMITS, SHARES, SHARES, SHARES, Limits(0.015, 0.025, 0.04))


def limits_of(figures: dict[str, object], thresholds: Thresholds) -> dict[str, dict[str, float]]:
    measured = [Measurement("2026-01-01T00:00:00.000Z", "audit 1", 1, "keep", figures)]
    return {chart.key: dict(chart.limits) for chart in build_charts(measured, thresholds)}


def test_of_the_two_agreements_the_judged_one_has_the_thresholds() -> None:
    both: dict[str, object] = {"agreement": 0.9, "confident_agreement": 0.99}
    found = limits_of(both, THRESHOLDS)
    assert found["confident_agreement"] == {"warn": 0.985, "consolidate": 0.975, "revert": 0.96}
    assert found["agreement"] == {}
    older = Thresholds(LIMITS, LIMITS, SHARES, SHARES, SHARES)
    found = limits_of(both, older)
    assert found["agreement"] == {"warn": 0.98, "consolidate": 0.97, "revert": 0.9}
    assert found["confident_agreement"] == {}


def test_a_model_that_is_sure_of_little_has_one_agreement() -> None:
    for few in ({"agreement": 0.9}, {"agreement": 0.9, "confident_agreement": None}):
        found = limits_of(dict(few), THRESHOLDS)
        assert "confident_agreement" not in found
        assert found["agreement"]["consolidate"] == 0.97
