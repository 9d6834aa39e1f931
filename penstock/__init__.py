"""Run language models far bigger than the GPU on one GPU, with layers streamed from host RAM and NVMe."""
