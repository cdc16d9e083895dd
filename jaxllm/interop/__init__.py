"""Weights and tokenizers from outside, and to outside: Hugging Face, GGUF, exported programs."""
