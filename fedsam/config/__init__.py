"""The description of a run: its keys, the presets, and the classes that names mean."""
