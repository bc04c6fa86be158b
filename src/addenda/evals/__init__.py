"""Evidence: what a run changed, measured on rows it never saw and on general prompts, and the report that shows it."""
