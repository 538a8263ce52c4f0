"""The tasks of the run ``failures``, by name: ``WAITER__CASE``. Read by the DAG file and by the test."""

CREATES = ("create_sync", "create_deferred")
SENSORS = ("sensor_poke", "sensor_reschedule", "sensor_deferred")

# What HeyGen answers to looks from the second on: a fault's fields.
REFUSALS = {"refused_401": 401, "refused_402": 402, "gone_404": 404}
TROUBLES = (
    {"status": 500},
    {"status": 503, "headers": {"Retry-After": "1"}},
    {"drop": "before"},
    {"html": True, "status": 502},
    {"html": True, "status": 200},
)

# For creates and sensors.
FATAL = ("job_fails", *REFUSALS, "wrong_resource")
FINE = ("survives_trouble", "oauth")
# For creates only: the POST itself is refused.
REFUSED_CREATES = ("create_401", "create_402")
# For sensors only.
SKIPS = {
    "soft_fail_job_fails": {"soft_fail": True},
    "never_fail_job_fails": {"never_fail": True},
    "never_fail_refused_401": {"never_fail": True},
    "soft_fail_times_out": {"soft_fail": True},
    "never_fail_times_out": {"never_fail": True},
}
SENSOR_CASES = (*FATAL, *FINE, *SKIPS, "times_out")
CREATE_CASES = (*FATAL, *FINE)
CONNECTIONS = {
    "wrong_resource": "heygen_wrong_resource",
    "oauth": "heygen_oauth",
    "create_401": "heygen_wrong_key",
    "create_402": "heygen_lipsyncs",
}
