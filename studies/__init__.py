"""Studies: pre-training objectives compared under one protocol, made by the commands of both stages."""
