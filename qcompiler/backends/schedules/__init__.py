"""TIR schedules, one operator family a file."""
