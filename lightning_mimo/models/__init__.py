"""Ready-made model configurations, one family a file."""
