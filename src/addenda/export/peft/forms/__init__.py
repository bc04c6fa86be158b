"""One file for each method that PEFT has too: its settings under PEFT's keys, its tensors under PEFT's names."""
