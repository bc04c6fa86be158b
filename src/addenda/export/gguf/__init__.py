"""llama.cpp's files, written and read: adapters, and whole models like another one with some tensors changed."""
