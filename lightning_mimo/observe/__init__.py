"""What ranks record of themselves, and what is made of it: telemetry, traces, timelines, the watchdog.

Imports ``layout`` and torch.
"""
