"""The machine's memory: how much of it a process may still take, and an arena for what a training step makes."""
