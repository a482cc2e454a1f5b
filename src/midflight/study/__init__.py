"""The paper as a study: what is run (spec), one arm (arm), all arms (run), kept (store), shown (report)."""
