"""Hypothesis for this folder: the same examples on every run, and no time limit for a slow machine."""

from hypothesis import settings

settings.register_profile("ppo", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("ppo")
