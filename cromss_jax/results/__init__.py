"""Results for people to read: tables, logs, pictures, maps.

Functions of NumPy arrays that write files. May import `data` and the rooms below it. Begin with
`report`.
"""
