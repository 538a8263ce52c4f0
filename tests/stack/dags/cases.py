"""The tasks of the run ``failures``, by name: ``WAITER__CASE``. Read by the DAG file and by the test."""

CREATES = ("create_sync", "create_deferred")
SENSORS = ("sensor_poke", "sensor_reschedule", "sensor_deferred")

# Each is met by one poll: a fault's fields.
TROUBLES = (
    {"status": 500},
    {"status": 503, "headers": {"Retry-After": "1"}},
    {"drop": "before"},
    {"html": True, "status": 502},
    {"html": True, "status": 200},
    {"status": 404},
)

# What the test does to a job once it was polled.
FATAL = ("job_fails", "gone_404")
FINE = ("survives_trouble", "oauth")
# Every poll is refused, from the first one on. That ends no wait before its time is over.
REFUSED_POLLS = ("refused_402",)
# For creates only: the POST itself is refused.
REFUSED_CREATES = ("create_401", "create_402", "wrong_resource")
# For sensors only.
TIMEOUTS = (*REFUSED_POLLS, "refused_401", "wrong_resource", "times_out")
SKIPS = {
    "soft_fail_job_fails": {"soft_fail": True},
    "never_fail_job_fails": {"never_fail": True},
    "never_fail_refused_401": {"never_fail": True},
    "soft_fail_times_out": {"soft_fail": True},
    "never_fail_times_out": {"never_fail": True},
}
STEERED = (*FATAL, *FINE, *(case for case in SKIPS if case.endswith("job_fails")))
CREATE_CASES = (*FATAL, *FINE, *REFUSED_POLLS)
SENSOR_CASES = (*FATAL, *FINE, *TIMEOUTS, *SKIPS)

CONNECTIONS = {
    "gone_404": "heygen_gone",
    "oauth": "heygen_oauth",
    "refused_401": "heygen_wrong_key",
    "never_fail_refused_401": "heygen_wrong_key",
    "refused_402": "heygen_refusing",
    "wrong_resource": "heygen_wrong_resource",
    "create_401": "heygen_wrong_key",
    "create_402": "heygen_lipsyncs",
}
