"""Verdicts without a reference against published draws: how often they are right."""
