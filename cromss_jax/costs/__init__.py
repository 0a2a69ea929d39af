"""What a compiled program costs: memory, arithmetic, traffic, communication.

Reads compiled programs; knows nothing of the networks and imports nothing of the other rooms.
Begin with `costs`.
"""
