"""One module or folder per study: its tables, figures and page, drawn from its result folder alone."""
