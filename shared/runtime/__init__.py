"""The process and its machine: devices, memory, worker processes, distributed processes, PyTorch, the terminal."""
