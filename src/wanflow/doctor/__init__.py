"""Examine this machine: its parts, its kernels, its problems."""
