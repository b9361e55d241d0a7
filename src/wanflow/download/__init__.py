"""Download published weights, and verify every byte."""
