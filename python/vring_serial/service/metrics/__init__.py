"""Metrics of a running service for Prometheus; see docs/management.md."""
