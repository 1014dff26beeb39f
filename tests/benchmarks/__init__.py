"""What lightning-mimo costs and saves, measured: ``python -m tests.benchmarks``."""
