"""What the reports of studies and searches share."""
