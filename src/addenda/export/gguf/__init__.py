"""GGUF files, as llama.cpp and what is built on it load them, from models that transformers runs."""
