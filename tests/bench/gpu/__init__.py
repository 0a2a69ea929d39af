"""What is measured and tested on a GPU: `python -m tests.bench.gpu`. Begin with `__main__`."""
