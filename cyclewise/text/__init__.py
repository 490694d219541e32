"""Text to token ids and back: tokenizers, incremental detokenizing and chat templates."""
