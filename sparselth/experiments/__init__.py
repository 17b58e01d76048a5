"""Experiments are functions: a frozen configuration in, a run folder out."""
