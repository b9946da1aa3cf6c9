"""Tesseracts for the tests, the benchmarks and the demo, and a way to serve them without Docker."""
