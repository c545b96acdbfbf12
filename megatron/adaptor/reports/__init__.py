"""Measurements of a step: metrics and traces."""
