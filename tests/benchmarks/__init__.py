"""Measurements, run on request; they print figures and fail nothing."""
