"""What this machine achieves: each part of tokenizing and of training beside its bare reference."""
