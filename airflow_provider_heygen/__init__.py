"""Apache Airflow provider for HeyGen's overdub (lipsync) jobs."""

__version__ = "0.1.0"
