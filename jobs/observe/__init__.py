"""What a run measures of itself while it goes on."""
