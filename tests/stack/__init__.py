"""Tests on a real Airflow: its processes, a database, a broker, and the emulator as a process of its own.

``keeper`` cleans up, ``airflow`` starts and kills, ``broker`` leads to Redis, ``rest`` asks Airflow,
``heygen`` steers the emulator.
The ``test_*`` files are part of ``make test``; the ``chaos_*`` files take longer: ``make test-stack``.
"""
