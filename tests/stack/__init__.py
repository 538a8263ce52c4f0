"""Tests on a real Airflow: its four processes, a database, and the emulator as a process of its own.

``keeper`` cleans up, ``airflow`` starts and kills, ``rest`` asks Airflow, ``heygen`` steers the emulator.
The ``test_*`` files are part of ``make test``; the ``chaos_*`` files take longer: ``make test-stack``.
"""
