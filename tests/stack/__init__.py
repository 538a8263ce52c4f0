"""Tests on a real Airflow: its processes, a database, a broker, and the emulator as a process of its own.

``keeper`` cleans up, ``airflow`` starts and kills, ``broker`` leads to Redis, ``rest`` asks Airflow,
``heygen`` steers the emulator.
``make test-stack`` runs them: the ``test_*`` files first, then the ``chaos_*`` files, which take longer.
"""
