"""How fast a model is on a machine, and where the time of a step goes."""
