"""Plan a request before a weight is read: what it needs, how it runs, and whether to start."""
