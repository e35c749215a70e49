"""`make gpu-check`: builds, checks and measures everything that runs on a GPU; its parts: __main__.py."""
