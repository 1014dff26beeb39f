"""What is made of the spans that ranks record: telemetry, traces, pictures, and reports of what hangs."""
