"""The quality of tokens for which images go through the tokenizer again: stability and reconstruction."""
