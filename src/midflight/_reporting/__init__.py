"""Provide figures, pages and tables for the reports of studies and searches."""
