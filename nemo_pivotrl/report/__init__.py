"""The report, and the viewer that it links to."""

VIEW_PORT = 8765
"""Where `view` listens unless it is told otherwise."""
VIEW_ADDRESS = f"http://127.0.0.1:{VIEW_PORT}/"
"""How the report's links begin; the viewer, which may listen elsewhere, puts its own place there."""
