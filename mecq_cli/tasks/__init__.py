"""What a model is for: classify images, segment them, or detect objects in them.

A `Task` owns all that differs: what a data folder holds, the loss of a training step and what it
counts, the metric, and what its figures are called. `figures.py` has the names alone, and needs no
torch; `registry.py` finds the task of a model.
"""
