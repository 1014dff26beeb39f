"""Lightning callbacks: the model summary over all ranks and the trace of one step.

Imports ``observe``, ``planning`` and Lightning.
"""
