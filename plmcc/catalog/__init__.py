"""Passes by name: shipped ones, installed ones, and their options without importing torch."""
