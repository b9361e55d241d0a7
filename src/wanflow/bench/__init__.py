"""Measure wanflow on a machine: the stages of a run, and what a GPU must answer first."""
