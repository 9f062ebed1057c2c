"""One module or folder a study: its tables, figures and page, drawn from its result folder alone."""
