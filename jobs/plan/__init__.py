"""The plan of a job: configuration, units, estimate, and the plain records that pass between steps."""
