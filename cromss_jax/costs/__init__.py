"""The costs of a compiled program: memory, arithmetic, memory traffic, communication.

Reads compiled programs. It knows nothing about the networks and imports nothing from the other
rooms. Begin with `costs`; `chips` has the chips' figures, `traffic` counts the memory
traffic of TPUs and GPUs, `table` prints the figures.
"""
