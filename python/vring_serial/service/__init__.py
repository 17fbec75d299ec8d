"""Processes: a keeper that holds descriptors and parses nothing, and workers that may die."""
