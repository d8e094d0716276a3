"""The composition root: Config -> data, split, model, method, strategy, actors.

Nothing else in the framework knows them all.
"""
