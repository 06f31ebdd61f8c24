"""Rows from files, the hub or memory, and their encoding for each task."""
