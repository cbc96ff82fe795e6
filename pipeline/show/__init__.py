"""What is shown of a run: on a terminal, in tables and in pictures."""
