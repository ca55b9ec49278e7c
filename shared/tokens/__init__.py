"""The two artifacts that both stages share: the codebook and the token store."""
