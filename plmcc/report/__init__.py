"""The result of a run as report.json, report.html, model card and lock."""
