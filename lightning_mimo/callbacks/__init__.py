"""Lightning callbacks: a model summary over all ranks, and a trace of one step.

Imports ``observe``, ``planning`` and Lightning.
"""
