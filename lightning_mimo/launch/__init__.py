"""Starts and ends ranks: cluster environments, the fork launcher, preemption.

Imports ``layout`` and Lightning's launchers and cluster environments.
"""
