"""Parts that the reports of studies and searches share: figures, pages, tables."""
