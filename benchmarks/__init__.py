"""Benchmarks: every table in this folder is made by ``make bench``."""
