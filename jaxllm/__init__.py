"""jaxllm: pure-functional language models in JAX and Flax."""
