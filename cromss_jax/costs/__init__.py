"""The costs of a compiled program: memory, arithmetic, memory traffic, communication.

Reads compiled programs. It knows nothing about the networks and imports nothing from the other
rooms. Begin with `costs`; `traffic` counts a TPU's memory traffic, `table` prints the figures.
"""
