"""The report of a study of combinations: one HTML file that opens offline, and the same in Markdown."""

from stackcomp.studies.report.content import files, write

__all__ = ["files", "write"]
