"""Recording of each rank's work, and its uses: telemetry, traces, timelines and the watchdog.

Imports ``layout`` and torch.
"""
