"""The command line: one thin file per verb, importing nothing heavy until a verb runs."""
