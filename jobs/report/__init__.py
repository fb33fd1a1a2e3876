"""The report: one HTML page that says what was run, what the maps show, and how far they can be trusted."""
