"""A comparison as one HTML page. It writes no files and judges nothing; it shows and words what is there."""

from __future__ import annotations

from pyro_vi_lab.report.page import render
from pyro_vi_lab.report.words import warnings_about

__all__ = ["render", "warnings_about"]
