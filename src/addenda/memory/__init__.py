"""The machine's memory: how much of it a process may still take."""
