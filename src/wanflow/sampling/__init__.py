"""Schedule, solvers, guidance and timeline, as pure functions and values."""
