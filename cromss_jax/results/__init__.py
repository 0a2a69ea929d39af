"""What people look at: tables, logs, pictures, maps.

Functions of NumPy arrays that write files. May import `data` and what lies below it. Begin with
`report`.
"""
