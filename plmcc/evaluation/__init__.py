"""Metrics, latency and the benchmark command."""
