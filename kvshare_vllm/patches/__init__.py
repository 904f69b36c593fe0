"""What is changed in vLLM and the libraries below it while a process runs; each file says when it can go."""
