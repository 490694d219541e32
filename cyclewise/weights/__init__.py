"""From a model's name to its bytes: sources find it, gguf reads it, formats name its blocks."""
